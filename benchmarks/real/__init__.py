"""Parts of `benchmarks.real_retrieval`: real data, small source models trained on it, and the texts that connect."""
