"""Upstream checkpoints turned into models of this package, each with a proof that the outputs agree."""
