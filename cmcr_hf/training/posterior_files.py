"""Posteriors on disk: a run that is stopped goes on behind what it has computed, and reads it without holding it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..durable import named_write_errors, sync_tree, write_durably
from .posteriors import BLOCKS, TOP, Posteriors, rest_of, top_weights

RECORD = "record.json"
FILES = {"texts": torch.int32, "weights": torch.float32}
# A kill loses no more, 64 MiB of them: seconds with a small bank, minutes of a CPU with one of a million texts.
ROWS_A_RECORD = 8192


def stored_posteriors(
    folder: Path, items: Tensor, bank: Tensor, *, temperature: float, top: int = TOP, progress: bool = True
) -> Posteriors:
    """Compute [`posteriors`] into a folder, or go on behind those of the same items, bank and settings in it.

    What it holds of others is replaced. The weights are memory-mapped: 8 bytes a weight on the disk, and in memory
    what is read of them.

    Args:
        items: `(n, dim)`, on the device to compute on.
        bank: `(m, dim)` texts in the same space, on the same device.
        temperature, top: as of [`posteriors`].
        progress: show a bar.

    Raises:
        WriteError: the disk is full or not writable.
    """
    top = min(top, len(bank))
    key = {"items": _digest(items), "bank": _digest(bank), "temperature": temperature, "top": top}
    with named_write_errors(folder):
        writer = _Writer.open(folder, key, top)
        rest = range(writer.rows, len(items), BLOCKS[0])
        with tqdm(
            total=len(items), initial=writer.rows, desc=f"posteriors {folder.name}", unit="item", disable=not progress
        ) as bar:
            for start in rest:
                texts, weights = top_weights(items[start : start + BLOCKS[0]], bank, temperature, top)
                writer.append(texts.to("cpu", torch.int32), weights.cpu())
                bar.update(len(texts))
        writer.record()
    mapped = {
        name: torch.from_file(str(folder / name), shared=False, size=len(items) * top, dtype=dtype).view(-1, top)
        for name, dtype in FILES.items()
    }
    rest_weights = torch.cat([rest_of(part, len(bank)) for part in _blocks(mapped["weights"])])
    return Posteriors(mapped["texts"], mapped["weights"], rest_weights, len(bank))


@dataclass
class _Writer:
    """Appends rows to the files of a folder, and vouches in a record for those that are on the disk."""

    folder: Path
    key: dict[str, Any]
    rows: int
    recorded: int

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any], top: int) -> _Writer:
        rows = _recorded(folder, key)
        row_bytes = {name: top * dtype.itemsize for name, dtype in FILES.items()}
        if any(_size(folder / name) < rows * width for name, width in row_bytes.items()):
            rows = 0
        if rows == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for name, width in row_bytes.items():
            # Behind the record lies what a kill left of a block.
            with (folder / name).open("ab") as file:
                file.truncate(rows * width)
        return cls(folder, key, rows, rows)

    def append(self, texts: Tensor, weights: Tensor) -> None:
        for name, part in (("texts", texts), ("weights", weights)):
            with (self.folder / name).open("ab") as file:
                file.write(part.contiguous().numpy().data)
        self.rows += len(texts)
        if self.rows - self.recorded >= ROWS_A_RECORD:
            self.record()

    def record(self) -> None:
        sync_tree(self.folder)
        write_durably(self.folder / RECORD, json.dumps({"key": self.key, "rows": self.rows}).encode())
        self.recorded = self.rows


def _recorded(folder: Path, key: dict[str, Any]) -> int:
    """Return how many rows a folder vouches for: none where it is of another key, or no record can be read."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return 0
    found = isinstance(record, dict) and record.get("key") == key and record.get("rows")
    return found if isinstance(found, int) else 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _digest(rows: Tensor) -> str:
    """Return the sha256, in hexadecimal, of the shape, the dtype and the bytes of a matrix."""
    digest = hashlib.sha256(f"{tuple(rows.shape)} {rows.dtype}".encode())
    for part in _blocks(rows):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    return iter(rows.split(ROWS_A_RECORD))
