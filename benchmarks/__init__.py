"""Speed against peers: one module a table, ratios of one run on one machine. `python -m benchmarks` runs them all."""
