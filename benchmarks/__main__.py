"""Run every benchmark: `python -m benchmarks`, or one: `python -m benchmarks.aggregation`."""

from __future__ import annotations

from . import aggregation, training_step


def main() -> None:
    for module in (aggregation, training_step):
        module.main([])
        print()


if __name__ == "__main__":
    main()
