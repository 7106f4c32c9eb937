"""Every table of a GPU in one call of at most nine minutes: its floors, aggregation, training, embedding, log-mel.

    python -m benchmarks.gpu --output benchmarks/results/gpu-2026-11-26.json

Each table is a process of its own; the file is written after each, so that a table that fails costs only itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import measure_apart, save
from benchmarks.timing import machine

# Each with its options, and those of a rehearsal where there is a small size; in the order of what would be missed
# most, should the time not suffice.
TABLES: list[tuple[str, list[str], list[str] | None]] = [
    ("floors", [], ["--size", "64", "--rows", "100", "--mebibytes", "1", "--repeats", "1"]),
    (
        "aggregation",
        ["--queries", "32768", "--memory", "262144", "--repeats", "3"],
        ["--queries", "40", "--memory", "300", "--dim", "64", "--repeats", "1"],
    ),
    ("aggregation", ["--project"], None),
    ("training_step", [], ["--batch", "16", "--dim", "8", "--steps", "2", "--repeats", "1"]),
    (
        "training_step",
        ["--project", "--steps", "500"],
        ["--project", "--steps", "2", "--batch", "16", "--dim", "8", "--rows", "64"],
    ),
    ("log_mel", [], ["--clips", "2", "--seconds", "1", "--repeats", "1"]),
    (
        "embedding",
        ["--texts", "16384", "--images", "2048", "--clips", "192", "--repeats", "2"],
        ["--texts", "4", "--images", "4", "--clips", "2", "--repeats", "1"],
    ),
]
NAMES = tuple(dict.fromkeys(name for name, *_ in TABLES))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for all tables")
    parser.add_argument("--only", action="append", choices=NAMES, help="measure these alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same at tiny sizes on the CPU")
    parser.add_argument("--sources", type=Path, help="as for benchmarks.embedding")
    arguments = parser.parse_args(argv)
    device = "cpu" if arguments.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: There is no CUDA device here. Run this on a machine with one, or with --rehearse on the CPU.")
    start = time.perf_counter()
    document: dict[str, Any] = {"machine": machine(device), "tables": []}
    print(document["machine"], flush=True)
    for name, options, tiny in TABLES:
        chosen = tiny if arguments.rehearse else options
        if chosen is None or (arguments.only and name not in arguments.only):
            continue
        left = 60 * arguments.minutes - (time.perf_counter() - start)
        argv = [*chosen, "--device", device]
        if name == "embedding" and arguments.sources is not None:
            argv += ["--sources", str(arguments.sources)]
        print(f"\n== {name}", flush=True)
        document["tables"].append(measure_apart(name, argv, timeout=max(left, 1.0)))
        document["seconds"] = round(time.perf_counter() - start, 1)
        save(arguments.output, document)
    print(f"\n{document['seconds']:.0f} s in all, kept in {arguments.output}")
    failed = [table["table"] for table in document["tables"] if "error" in table]
    if failed:
        sys.exit(f"error: These tables failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
