"""Alternating timings, so that a machine that slows down slows every contender."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def machine(device: str = "cpu") -> str:
    """Describe the machine in a line: processor, cores in use, torch, and the GPU where that is measured."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in rounds of one turn each, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def alternate(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each contender over the rounds of [`turns`]."""
    return {name: statistics.median(values) for name, values in turns(contenders, repeats).items()}
