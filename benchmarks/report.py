"""Tables: laid out in columns, run in a process of their own, kept as JSON."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.timing import machine


def format_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Lay rows out below the titles of their columns.

    Args:
        rows: values by the name of their column; a cell is empty where there is none, or None.
        columns: title and format of each, such as `{"rate": ("items/s", ".1f")}`. The first is aligned to the left.
    """
    cells = [
        ["" if row.get(name) is None else format(row[name], layout) for name, (_, layout) in columns.items()]
        for row in rows
    ]
    table = [[title for title, _ in columns.values()], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


class _Copy(io.TextIOBase):
    """Write to a stream, and keep a copy."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.kept = stream, io.StringIO()

    def write(self, text: str) -> int:
        self.kept.write(text)
        self.stream.write(text)
        self.stream.flush()
        return len(text)


def measure(name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark `benchmarks.NAME`, whose `main(argv)` prints its table and may return its rows, in here.

    Returns what it printed, as `lines`, with its `rows` (or None), its command, its seconds, the machine and the time.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    copy, start = _Copy(sys.stdout), time.perf_counter()
    with contextlib.redirect_stdout(copy):
        rows = module.main(list(argv))
    return {
        "table": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "lines": copy.kept.getvalue().splitlines(),
    }


def measure_apart(name: str, argv: Sequence[str] = (), timeout: float | None = None) -> dict[str, Any]:
    """Run a benchmark as [`measure`] does, in a process of its own, so that the settings of one do not reach the next.

    Where it fails or takes longer than `timeout` seconds, the entry has its `error` in place of a table.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        try:
            command = [sys.executable, "-m", "benchmarks.report", name, str(path), *argv]
            subprocess.run(command, check=True, timeout=timeout)
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except subprocess.CalledProcessError as error:
            reason = f"ended with status {error.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {timeout:.0f} s"
    print(f"benchmarks.{name} {reason}.", flush=True)
    command = ["python", "-m", f"benchmarks.{name}", *argv]
    seconds = round(time.perf_counter() - start, 1)
    return {"table": name, "command": shlex.join(command), "seconds": seconds, "error": reason}


def save(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save(Path(sys.argv[2]), measure(sys.argv[1], sys.argv[3:]))
