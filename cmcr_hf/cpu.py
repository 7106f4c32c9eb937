"""Settings of a process that make torch faster on a CPU. The `cmcr` command applies them; importing nothing does."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of the largest value of a product. With "medium", oneDNN adds up bfloat16 parts on processors that have them, to
# about 1e-6; where it rounds to bfloat16 alone, as with AMX, the error is about 3e-3.
MAX_ERROR = 1e-5
# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@contextmanager
def tuned_cpu() -> Iterator[str]:
    """Let matrix products be faster where their error stays below 1e-5, and malloc keep its memory; say what was set.

    `torch.set_float32_matmul_precision("medium")` after a check on random matrices, for the time of the context; on
    Linux, glibc's allocator neither maps large blocks anew nor gives them back from then on.
    """
    before = torch.get_float32_matmul_precision()
    try:
        error = _product_error("medium")
        if error > MAX_ERROR:
            torch.set_float32_matmul_precision("highest")
            precision = f'precision "highest" ("medium" errs by {error:.0e} here)'
        else:
            precision = f'precision "medium" (error {error:.0e})'
        kept = ", malloc keeps its memory" if _keep_memory() else ""
        yield f"CPU: {torch.get_num_threads()} threads, matrix products in float32 at {precision}{kept}"
    finally:
        torch.set_float32_matmul_precision(before)


def _product_error(precision: str) -> float:
    """Set the precision of float32 products and return their largest error, relative to the largest value."""
    torch.set_float32_matmul_precision(precision)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())


def _keep_memory() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # Without a threshold, memory that is freed is not trimmed; -1 is the largest.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
