"""Run the benchmarks of speed: a table each, in a process of its own, all of them in about a quarter of an hour.

One alone, with its options: `python -m benchmarks.aggregation --help`.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from pathlib import Path

from .report import measure_apart, save

# In order; each has `main(argv)`, which prints its table and may return its rows.
TABLES = ("floors", "front_ends", "embedding", "aggregation", "training_step", "point_clouds", "service", "growth")
# By their own commands: what is of a GPU, or needs real data and its time.
APART = ("gpu", "log_mel", "real_retrieval", "ablations")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--only", action="append", choices=TABLES, metavar="NAME", help="run this table alone")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep each table there, as NAME.json")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for name in (*TABLES, *APART):
            print(f"{name:15} {_summary(name)}")
        print(f"\n`python -m benchmarks` runs all but {', '.join(APART)}, which are commands of their own.")
        return
    start, failed = time.perf_counter(), []
    for name in arguments.only or TABLES:
        options = []
        if name == "growth" and arguments.output is not None:
            options = ["--output", str(arguments.output / "growth.svg")]
        print(f"== {name}: python -m benchmarks.{name}\n", flush=True)
        table = measure_apart(name, options)
        print(f"\n({table['seconds']:.0f} s)\n", flush=True)
        if "error" in table:
            failed.append(name)
        if arguments.output is not None:
            save(arguments.output / f"{name}.json", table)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if failed:
        sys.exit(f"error: These tables failed: {', '.join(failed)}.")


def _summary(name: str) -> str:
    """Return the first sentence of a benchmark's docstring, without the seconds that an import of it takes."""
    text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    main()
