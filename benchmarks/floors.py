"""What the machine itself can do, which other tables are to be held against: matrix products, memory, disk, sha256,
decoding; and the embedding store against the disk and the hash under it."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.report import format_table
from benchmarks.sources import write_clips, write_images
from benchmarks.timing import machine, turns
from cmcr_hf.cpu import products_in
from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.image_loading_cmcr import load_image
from cmcr_hf.training.store import EmbeddingStore

DIM = 512
FILES = 8
COLUMNS = {"what": ("", ""), "rate": ("rate", ",.1f"), "unit": ("", "<"), "share": ("of its floor", ".0%")}


def products(size: int, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Return products of square matrices by the name of their precision, each 2 size ** 3 operations."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    halves = left.bfloat16(), right.bfloat16()

    def multiply(factors: tuple[torch.Tensor, torch.Tensor], precision: str) -> None:
        if device == "cpu":
            with products_in(precision):
                torch.matmul(*factors)
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            torch.matmul(*factors)
            torch.cuda.synchronize()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    precisions = ["ieee", "tf32"]
    if device == "cpu":
        # Before torch 2.9, there is one.
        precisions = ["ieee", "bf16"] if hasattr(torch.backends.mkldnn, "matmul") else ["ieee"]
    found: dict[str, Callable[[], object]] = {
        f"float32 as {precision!r}": lambda precision=precision: multiply((left, right), precision)
        for precision in precisions
    }
    return {**found, "bfloat16": lambda: multiply(halves, "ieee")}


def _evict(*paths: Path) -> None:
    """Ask the system to forget what it holds of files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, help="rows of the square matrices (default: 2048, of a GPU 8192)")
    parser.add_argument("--rows", type=int, default=65536, help=f"rows of the store, {DIM} float32 each")
    parser.add_argument("--mebibytes", type=int, default=256, help="size of what is copied in memory")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds, of which the best counts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)
    device, size = arguments.device, arguments.size or (2048 if arguments.device == "cpu" else 8192)
    rows: list[dict[str, Any]] = []

    def add(what: str, rate: float, unit: str, share: float | None = None) -> None:
        rows.append({"what": what, "rate": rate, "unit": unit, "share": share})

    def best(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
        return {name: min(seconds) for name, seconds in turns(contenders, arguments.repeats).items()}

    for name, seconds in best(products(size, device)).items():
        add(f"matrix product, {name}, {size} x {size} x {size}", 2 * size**3 / seconds / 1e9, "GFLOP/s")
    for name, (moved, run) in _copies(arguments.mebibytes << 20, device).items():
        add(name, moved / best({name: run})[name] / 1e9, "GB/s")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _measure_disk(folder, arguments.rows, best, add)
        # Decoding takes one thread.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        _measure_decoding(folder, best, add)
        torch.set_num_threads(threads)
    print(f"Floors: what the machine can do\n{machine(device)}; best of {arguments.repeats} rounds\n")
    print(format_table(rows, COLUMNS))
    return rows


def _copies(size: int, device: str) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return copies within memory and, with a GPU, to it: the bytes that move, and what moves them."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    if device == "cpu":
        return {"memory, read and written": (2 * size, lambda: target.copy_(source))}
    host = torch.zeros(size, dtype=torch.uint8).pin_memory()

    def copy(source: torch.Tensor) -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return {
        "memory of the GPU, read and written": (2 * size, lambda: copy(source)),
        "from pinned memory to the GPU": (size, lambda: copy(host)),
    }


def _measure_disk(
    folder: Path,
    number: int,
    best: Callable[[dict[str, Callable[[], object]]], dict[str, float]],
    add: Callable[..., None],
) -> None:
    embeds = F.normalize(torch.randn(number, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    data, file, keys = embeds.numpy().tobytes(), folder / "raw", [""] * number
    buffer = bytearray(len(data))

    def write() -> None:
        with file.open("wb") as opened:
            opened.write(data)
            os.fsync(opened.fileno())

    def write_store() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        source = {"id": "random", "revision": "0", "config_hash": "0"}
        store = EmbeddingStore.create(
            folder / "store", space="clip", modality="text", source=source, dim=DIM, data_fingerprint="random"
        )
        store.append(embeds, keys)
        store.finish()

    def read() -> None:
        _evict(file)
        with file.open("rb", buffering=0) as opened:
            opened.readinto(buffer)

    def read_store() -> None:
        _evict(*(folder / "store").iterdir())
        EmbeddingStore.open(folder / "store").tensor().sum()

    seconds = best(
        {
            "hash": lambda: hashlib.sha256(data),
            "write": write,
            "write store": write_store,
            "read": read,
            "read store": read_store,
        }
    )
    names = {
        "hash": "sha256",
        "write": "disk, a file written and synced",
        "write store": "store written and synced; floor: disk and sha256",
        "read": "disk, a file read that is not in memory",
        "read store": "store opened and read; floor: disk and sha256",
    }
    for name, title in names.items():
        kind = name.removesuffix(" store")
        share = (seconds[kind] + seconds["hash"]) / seconds[name] if name != kind else None
        add(title, len(data) / seconds[name] / 1e6, "MB/s", share)


def _measure_decoding(
    folder: Path, best: Callable[[dict[str, Callable[[], object]]], dict[str, float]], add: Callable[..., None]
) -> None:
    images, clips = write_images(folder / "images", FILES), write_clips(folder / "clips", FILES, 10)

    def each(call: Callable[[Path], object], paths: list[Path]) -> Callable[[], object]:
        return lambda: [call(path) for path in paths]

    seconds = best(
        {
            "image, plain": each(lambda path: Image.open(path).convert("RGB"), images),
            "image, ours": each(load_image, images),
            "audio, plain": each(lambda path: soundfile.read(path, dtype="float32"), clips),
            "audio, ours": each(lambda path: load_audio(path, 48_000), clips),
        }
    )
    names = {
        "image, plain": "JPEG 640 x 480 decoded by Pillow",
        "image, ours": "the same by `load_image`",
        "audio, plain": "FLAC of 10 s, 44.1 kHz stereo, decoded by soundfile",
        "audio, ours": "the same by `load_audio`, as 48 kHz mono",
    }
    for name, title in names.items():
        kind, who = name.split(", ")
        share = seconds[f"{kind}, plain"] / seconds[name] if who == "ours" else None
        add(title, FILES / seconds[name], "items/s a core", share)


if __name__ == "__main__":
    main()
