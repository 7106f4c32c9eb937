"""Settings of a process that make torch faster on a CPU. The `cmcr` command applies them; importing nothing does."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from threading import Barrier, BrokenBarrierError

import torch

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@cache
def float32_products() -> str:
    """Return how float32 matrices are best multiplied on this machine: "bf16" or "ieee", as torch names it.

    On a CPU, what torch calls bf16 (`set_float32_matmul_precision("medium")`) only chooses a faster library, as long
    as the processor has no float32 products by bfloat16 (AMX). So it is taken where it errs as little as "ieee" on
    random matrices, by less than 1e-5 of their product's norm (bfloat16: 2e-3), else "ieee". Without the settings of
    torch 2.9, "ieee".
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return "ieee"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, 512, generator=generator) for rows in (512, 2048))
    exact = left.double() @ right.double().T
    with torch.autocast("cpu", enabled=False), products_in("bf16"):
        error = (left @ right.T - exact).norm() / exact.norm()
    return "bf16" if error < 1e-5 else "ieee"


@contextmanager
def products_in(precision: str, cuda: str = "ieee") -> Iterator[None]:
    """Multiply float32 matrices in "bf16" or "ieee" on the CPU, in "ieee" or "tf32" on CUDA; put settings back after.

    Does nothing before torch 2.9.
    """
    if not hasattr(torch.backends.mkldnn, "matmul"):
        yield
        return
    settings = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    wanted = (precision, cuda)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting, value in zip(settings, wanted, strict=True):
            setting.fp32_precision = value
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextmanager
def pool(threads: int, cores: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Start threads in each of which torch computes on so many cores; what it does in others is left as it is."""
    before = torch.get_num_threads()
    started = Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(cores)
        # Broken where the one who starts them was interrupted, which is told there.
        with suppress(BrokenBarrierError):
            started.wait()

    with ThreadPoolExecutor(threads, initializer=start) as executor:
        for _ in range(threads):
            executor.submit(int)
        started.wait()
        # Each thread keeps its number, but those to come, and `torch.get_num_threads`, have the last that was set.
        torch.set_num_threads(before)
        yield executor


@contextmanager
def tuned_cpu() -> Iterator[str]:
    """Let matrix products be faster where that costs no precision, and malloc keep its memory; say what was set.

    The first holds for the time of the context (see [`float32_products`]); on Linux, glibc's allocator neither maps
    large blocks anew nor gives them back from then on.
    """
    precision = float32_products()
    kept = ", malloc keeps its memory" if _keep_memory() else ""
    with products_in(precision):
        yield f"CPU: {torch.get_num_threads()} threads, float32 products as {precision!r}, errors below 1e-5{kept}"


def _keep_memory() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # Without a threshold, memory that is freed is not trimmed; -1 is the largest.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
