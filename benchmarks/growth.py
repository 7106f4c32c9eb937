"""How the cost of every stage grows with its rows: embedding of texts, images and audio, aggregation, a training step
and an epoch, a search. `--output FILE.svg` draws it.

SYNTHETIC items and random weights of real sizes. A slope of 1 in the logarithms is a cost in proportion to the rows;
below it, what each run costs once still shows.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.sax.saxutils import escape

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.embedding import CAPTIONS, Contender
from benchmarks.report import format_table
from benchmarks.sources import (
    add_sources_option,
    captions,
    quiet_transformers,
    write_captions,
    write_clips,
    write_images,
    write_sources,
)
from benchmarks.timing import alternate, machine
from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.cpu import tuned_cpu
from cmcr_hf.durable import write_durably
from cmcr_hf.search import SearchIndex
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.train import ConnectorTrainingArguments, train_connector

DIM = 512
# The largest number of rows of each stage; every size is a fraction of it.
LARGEST = {
    "embed text": 512,
    "embed image": 128,
    "embed audio": 64,
    "aggregate, texts": 8192,
    "aggregate, memory": 65536,
    "training step": 4096,
    "training epoch": 32768,
    "search": 262144,
}
NOTES = {
    "embed text": "captions",
    "embed image": "640 x 480 JPEG",
    "embed audio": "10 s FLAC",
    "aggregate, texts": "over a memory of 16,384 x 512",
    "aggregate, memory": "of 2,048 texts",
    "training step": "a batch of so many rows, in a bare loop",
    "training epoch": "under Trainer, in batches of 512",
    "search": "of an embedded query, over so many vectors",
}
COLORS = ("#4269d0", "#3ca951", "#ff725c", "#6cc5b0", "#9c6b4e", "#a463f2", "#c99300", "#56606b")
COLUMNS = {"stage": ("stage", ""), "rows": ("rows", ",d"), "seconds": ("seconds", ".4f"), "each": ("us a row", ",.1f")}
SLOPES = {
    "stage": ("stage", ""),
    "note": ("", "<"),
    "rows": ("rows up to", ",d"),
    "seconds": ("seconds", ".3f"),
    "each": ("us a row", ",.1f"),
    "slope": ("slope", ".2f"),
    "last": ("of the last two sizes", ".2f"),
}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", action="append", choices=LARGEST, help="measure these alone")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes")
    parser.add_argument("--sizes", type=int, default=5, help="of each stage, every one half of the next")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds")
    parser.add_argument("--output", type=Path, metavar="FILE.svg", help="draw the plot here")
    add_sources_option(parser)
    arguments = parser.parse_args(argv)
    quiet_transformers()
    print(f"Growth with the rows, SYNTHETIC items, RANDOM weights, float32\n{machine()}\n", flush=True)
    measured: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as place, tuned_cpu():
        folder = Path(place)
        for stage in arguments.only or LARGEST:
            largest = max(int(LARGEST[stage] * arguments.scale), 1 << arguments.sizes)
            sizes = [largest >> halvings for halvings in reversed(range(arguments.sizes))]
            if stage.startswith("embed"):
                runs = _embedding(stage.removeprefix("embed "), sizes, folder, arguments.sources)
            else:
                runs = STAGES[stage](sizes, folder)
            seconds = alternate({str(size): run for size, run in runs.items()}, arguments.repeats)
            measured[stage] = {size: seconds[str(size)] for size in sizes}
    rows = [
        {"stage": stage, "rows": size, "seconds": value, "each": 1e6 * value / size}
        for stage, found in measured.items()
        for size, value in found.items()
    ]
    summary = []
    for stage, found in measured.items():
        size, value = list(found.items())[-1]
        each = {"rows": size, "seconds": value, "each": 1e6 * value / size}
        ends = {"slope": slope(found), "last": slope(dict(list(found.items())[-2:]))}
        summary.append({"stage": stage, "note": NOTES[stage], **each, **ends})
    print(format_table(summary, SLOPES))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_durably(arguments.output, draw(measured, machine()).encode())
        print(f"\nDrawn in {arguments.output}")
    return [*rows, *summary]


def slope(seconds: dict[int, float]) -> float:
    """Fit a line through the logarithms of rows and seconds, and return its slope."""
    x, y = ([math.log(value) for value in values] for values in (seconds.keys(), seconds.values()))
    return statistics.linear_regression(x, y).slope


def _embedding(
    modality: str, sizes: Sequence[int], folder: Path, sources: Path | None
) -> dict[int, Callable[[], Any]]:
    if sources is None:
        sources = folder / "sources"
        if not sources.exists():
            write_sources(sources)
    if modality == "text":
        write_captions(folder / CAPTIONS, max(sizes))
    elif modality == "image":
        write_images(folder / modality, max(sizes))
    else:
        write_clips(folder / modality, max(sizes), 10)
    contender = Contender("tuned", modality, folder, sources, "cpu")
    return {size: lambda size=size: contender.embed_first(size) for size in sizes}


def unit_rows(rows: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _aggregate_texts(sizes: Sequence[int], folder: Path) -> dict[int, Callable[[], Any]]:
    texts, memory = unit_rows(max(sizes)), unit_rows(16384, seed=1)
    return {size: lambda size=size: aggregate(texts[:size], memory, temperature=0.01) for size in sizes}


def _aggregate_memory(sizes: Sequence[int], folder: Path) -> dict[int, Callable[[], Any]]:
    texts, memory = unit_rows(2048), unit_rows(max(sizes), seed=1)
    return {size: lambda size=size: aggregate(texts, memory[:size], temperature=0.01) for size in sizes}


def _connection(rows: int) -> tuple[CMCRConfig, dict[str, torch.Tensor]]:
    names = ("clip_text", "clap_text", "clip_image", "clap_audio")
    embeds = {name: unit_rows(rows, seed) for seed, name in enumerate(names)}
    return CMCRConfig(projectors={space: {"input_dim": DIM} for space in ("clip", "clap")}), embeds


def _training_step(sizes: Sequence[int], folder: Path) -> dict[int, Callable[[], Any]]:
    config, embeds = _connection(max(sizes))
    connector = CMCRConnector(config).train()
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3, fused=True)

    def step(size: int) -> None:
        connector(embeds={name: tensor[:size] for name, tensor in embeds.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {size: lambda size=size: step(size) for size in sizes}


def _training_epoch(sizes: Sequence[int], folder: Path) -> dict[int, Callable[[], Any]]:
    config, embeds = _connection(max(sizes))

    def train(size: int) -> None:
        args = ConnectorTrainingArguments(
            output_dir=str(folder / "training"),
            num_train_epochs=1,
            per_device_train_batch_size=min(512, *sizes),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        train_connector(config, {name: tensor[:size] for name, tensor in embeds.items()}, args, log_lines=False)

    return {size: lambda size=size: train(size) for size in sizes}


class _RandomEmbedder:
    """Stands in for a model, whose time is not that of the search."""

    digest = hashlib.sha256(b"random").hexdigest()
    modalities = ("text",)

    def __init__(self, *_: object) -> None:
        self._generator = np.random.default_rng(0)

    def check(self, modality: str) -> None:
        pass

    def embed(self, modality: str, values: Sequence[str]) -> tuple[list[np.ndarray], list[None]]:
        rows = self._generator.standard_normal((len(values), DIM), dtype=np.float32)
        return list(rows / np.linalg.norm(rows, axis=1, keepdims=True)), [None] * len(values)


def _search(sizes: Sequence[int], folder: Path) -> dict[int, Callable[[], Any]]:
    lines = [f"{number} {text}" for number, text in enumerate(captions(1000) * (max(sizes) // 1000 + 1))]
    runs: dict[int, Callable[[], Any]] = {}
    for size in sizes:
        place = folder / f"lines-{size}"
        place.mkdir()
        # A file of texts may not be larger than the index takes.
        for start in range(0, size, 65536):
            (place / f"{start}.txt").write_text("\n".join(lines[start : min(start + 65536, size)]), encoding="utf-8")
        with patch("cmcr_hf.search.index.Embedder", _RandomEmbedder):
            index = SearchIndex("random", place, modalities=["text"], cache=folder / f"index-{size}", batch_size=8192)
        index.update(progress=False)
        shutil.rmtree(place)
        runs[size] = lambda index=index: index.search("a dog barks")
    return runs


STAGES = {
    "aggregate, texts": _aggregate_texts,
    "aggregate, memory": _aggregate_memory,
    "training step": _training_step,
    "training epoch": _training_epoch,
    "search": _search,
}


def draw(measured: dict[str, dict[int, float]], caption: str) -> str:
    """Return an SVG of seconds over rows, a line a stage, both axes logarithmic."""
    width, height, left, top, right, bottom = 1040, 600, 78, 46, 350, 76
    rows = [size for found in measured.values() for size in found]
    seconds = [value for found in measured.values() for value in found.values()]
    (x_low, x_high), (y_low, y_high) = (
        (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)) for values in (rows, seconds)
    )

    def x(value: float) -> float:
        return left + (math.log10(value) - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return height - bottom - (math.log10(value) - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="14" fill="#1f2328">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="26" font-size="17" font-weight="600">Seconds of every stage over its rows</text>',
    ]
    for power in range(x_low, x_high + 1):
        at = f"{x(10**power):.1f}"
        parts.append(f'<path d="M{at} {top}V{height - bottom}" stroke="#d8dde3"/>')
        parts.append(f'<text x="{at}" y="{height - bottom + 20}" text-anchor="middle">{10**power:,}</text>')
    for power in range(y_low, y_high + 1):
        at = f"{y(10**power):.1f}"
        parts.append(f'<path d="M{left} {at}H{width - right}" stroke="#d8dde3"/>')
        value = f"{10**power:,} s" if power >= 0 else f"{10.0 ** (power + 3):g} ms"
        parts.append(f'<text x="{left - 8}" y="{float(at) + 5:.1f}" text-anchor="end">{value}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{height - bottom + 42}" text-anchor="middle">rows</text>')
    # Names at the height of the lines' ends, each at least its own height below the one above.
    ends = sorted(measured, key=lambda stage: y(list(measured[stage].values())[-1]))
    places, floor = {}, -math.inf
    for stage in ends:
        places[stage] = floor = max(y(list(measured[stage].values())[-1]) + 5, floor + 36)
    overflow = max(max(places.values()) + 18 - (height - bottom), 0.0)
    for stage, color in zip(measured, COLORS, strict=False):
        points = [(x(size), y(value)) for size, value in measured[stage].items()]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{color}"/>' for across, down in points]
        label, place = width - right + 34, places[stage] - overflow
        lead = f"M{points[-1][0] + 6:.1f} {points[-1][1]:.1f}L{label - 22} {place - 5:.1f}H{label - 6}"
        parts.append(f'<path d="{lead}" fill="none" stroke="{color}" stroke-dasharray="2 3"/>')
        title = escape(f"{stage}, slope {slope(measured[stage]):.2f}")
        parts.append(f'<text x="{label}" y="{place:.1f}" font-weight="600" fill="{color}">{title}</text>')
        parts.append(f'<text x="{label}" y="{place + 15:.1f}" font-size="11.5">{escape(NOTES[stage])}</text>')
    parts.append(f'<text x="{left}" y="{height - 10}" font-size="11.5" fill="#56606b">{escape(caption)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
