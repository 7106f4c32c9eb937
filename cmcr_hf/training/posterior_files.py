"""Posteriors on disk: a run that is stopped goes on behind what it has computed, and reads it without holding it."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..durable import LOCK, locked, named_write_errors, sync_tree, write_durably
from .posteriors import BLOCKS, TOP, Posteriors, rest_of, top_weights

# Of each memory, behind its name.
RECORD, FILES = ".json", {".texts": torch.int32, ".weights": torch.float32}
# A kill loses no more, 64 MiB of them: seconds with a small bank, minutes of a CPU with one of a million texts.
ROWS_A_RECORD = 8192


def stored_posteriors(
    path: Path, items: Tensor, bank: Tensor, *, temperature: float, top: int = TOP, progress: bool = True
) -> Posteriors:
    """Compute [`posteriors`] into files, or go on behind those of the same items, bank and settings in them.

    What they hold of others, or what is damaged, is replaced. The weights are memory-mapped: 8 bytes a weight on the
    disk, and in memory what is read of them.

    Args:
        path: of the files, without what tells them apart: `FOLDER/clip_image`.
        items: `(n, dim)`, on the device to compute on.
        bank: `(m, dim)` texts in the same space, on the same device.
        temperature, top: as of [`posteriors`].
        progress: show a bar.

    Raises:
        WriteError: the disk is full or not writable.
    """
    top = min(top, len(bank))
    key = {"items": _digest(items), "bank": _digest(bank), "temperature": temperature, "top": top}
    with named_write_errors(path.parent):
        writer = _Writer(path, key, top)
        with tqdm(
            total=len(items), initial=writer.rows, desc=f"posteriors {path.name}", unit="item", disable=not progress
        ) as bar:
            for start in range(writer.rows, len(items), BLOCKS[0]):
                texts, weights = top_weights(items[start : start + BLOCKS[0]], bank, temperature, top)
                writer.append(texts.to("cpu", torch.int32), weights.cpu())
                bar.update(len(texts))
        writer.record()
    mapped = [
        torch.from_file(str(_file(path, name)), shared=False, size=len(items) * top, dtype=dtype).view(-1, top)
        for name, dtype in FILES.items()
    ]
    rest = torch.cat([rest_of(part, len(bank)) for part in mapped[1].split(ROWS_A_RECORD)])
    return Posteriors(mapped[0], mapped[1], rest, len(bank))


def remove_posteriors(folder: Path) -> None:
    """Remove what [`stored_posteriors`] wrote to a folder, and the folder if nothing else is in it.

    Raises:
        ValueError: another run is using it.
    """
    if not folder.is_dir():
        return
    with locked(folder):
        ours = [path.with_suffix("") for path in folder.glob("*.texts") if path.with_suffix(".weights").is_file()]
        for path in ours:
            for suffix in (RECORD, *FILES):
                _file(path, suffix).unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


class _Writer:
    """Appends rows to files, and vouches in a record for the parts of them that are on the disk."""

    def __init__(self, path: Path, key: dict[str, Any], top: int) -> None:
        self.path, self.key = path, key
        self._widths = {name: top * dtype.itemsize for name, dtype in FILES.items()}
        self._parts = self._whole_parts()
        self.rows = sum(part["rows"] for part in self._parts)
        self._recorded = self.rows
        for name, width in self._widths.items():
            # Behind the record lies what a kill left of a block.
            with _file(path, name).open("ab") as file:
                file.truncate(self.rows * width)
        self._hashes = {name: hashlib.sha256() for name in FILES}

    def _whole_parts(self) -> list[dict[str, Any]]:
        """Return the recorded parts up to the first that is not as it was written; none of another key."""
        found: list[dict[str, Any]] = []
        try:
            record = json.loads(_file(self.path, RECORD).read_bytes())
            if record["key"] != self.key:
                return []
            with ExitStack() as stack:
                files = {name: stack.enter_context(_file(self.path, name).open("rb")) for name in FILES}
                for part in record["parts"]:
                    rows = range(part["rows"])
                    for name, file in files.items():
                        content = file.read(len(rows) * self._widths[name])
                        if hashlib.sha256(content).hexdigest() != part[name]:
                            return found
                    found.append(part)
        # No file, or one that somebody has written to.
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return found

    def append(self, texts: Tensor, weights: Tensor) -> None:
        for name, part in zip(FILES, (texts, weights), strict=True):
            content = part.contiguous().numpy().data
            with _file(self.path, name).open("ab") as file:
                file.write(content)
            self._hashes[name].update(content)
        self.rows += len(texts)
        if self.rows - self._recorded >= ROWS_A_RECORD:
            self.record()

    def record(self) -> None:
        if self.rows > self._recorded:
            digests = {name: digest.hexdigest() for name, digest in self._hashes.items()}
            self._parts.append({"rows": self.rows - self._recorded, **digests})
        sync_tree(self.path.parent)
        write_durably(_file(self.path, RECORD), json.dumps({"key": self.key, "parts": self._parts}).encode())
        self._recorded = self.rows
        self._hashes = {name: hashlib.sha256() for name in FILES}


def _file(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _digest(rows: Tensor) -> str:
    """Return the sha256, in hexadecimal, of the shape, the dtype and the bytes of a matrix."""
    digest = hashlib.sha256(f"{tuple(rows.shape)} {rows.dtype}".encode())
    for part in rows.split(ROWS_A_RECORD):
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
