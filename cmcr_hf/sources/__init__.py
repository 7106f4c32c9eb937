"""Models that transformers lacks, as sources: each module has `load_model` and `load_parts` for names of its own."""
