"""Files and waveforms in, the inputs of the encoders out: ours against plain transformers, soundfile, soxr and pillow,
against what each cannot do without, and in threads against processes.

SYNTHETIC files: JPEGs of 640 x 480 pixels, stereo clips at 44.1 kHz. All but the last table on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ClapFeatureExtractor, CLIPImageProcessorPil
from transformers.utils import logging

from benchmarks.embedding import BATCH, write_files
from benchmarks.timing import alternate, machine
from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio, extract_image, extract_images
from cmcr_hf.modeling.image_loading_cmcr import load_image
from cmcr_hf.modeling.log_mel_cmcr import BLOCK

RATE = 48_000
FORMATS = {"wav": "PCM_16", "flac": "PCM_16", "mp3": None, "ogg": None}
# A turn, so that what the turn before left in the caches counts little.
CALLS = 5
CLAP = {"fused": "fusion", "unfused": "rand_trunc"}

Rows = dict[str, tuple[Callable[[], object], Callable[[], object], Callable[[], object]]]


def log_mels() -> Rows:
    """Return, by what is made of a decoded waveform: transformers, ours, and the real transforms of its frames."""
    generator = np.random.default_rng(0)
    rows: Rows = {}
    for seconds, kind in ((10, "unfused"), (10, "fused"), (25, "fused")):
        extractor = ClapFeatureExtractor(truncation=CLAP[kind], frequency_min=50)
        clip = generator.normal(0, 0.1, seconds * RATE).astype(np.float32)
        block = torch.randn(BLOCK, extractor.fft_window_size)
        blocks = round((len(clip) // extractor.hop_length + 1) / BLOCK)
        rows[f"log-mel, {seconds} s {kind}"] = (
            partial(extractor, clip, sampling_rate=RATE, return_tensors="np"),
            partial(extract_audio, clip, extractor, RATE),
            partial(_transform, block, blocks),
        )
    return rows


def _transform(block: torch.Tensor, times: int) -> None:
    for _ in range(times):
        torch.fft.rfft(block)


def _repeated(run: Callable[[], object]) -> None:
    for _ in range(CALLS):
        run()


def decoding(folder: Path) -> Rows:
    """Return, by format: what the documentation of soundfile and soxr shows, ours, and theirs without the downmix."""
    samples, rate = soundfile.read(next((folder / "audio").iterdir()), dtype="float32")
    rows: Rows = {}
    for name, subtype in FORMATS.items():
        path = folder / f"clip.{name}"
        soundfile.write(path, samples, rate, subtype=subtype)
        rows[f"decode, mix down and resample 10 s, {name}"] = (
            partial(_decode, path, lambda samples: samples.mean(axis=1)),
            partial(load_audio, path, RATE),
            partial(_decode, path, lambda samples: np.ascontiguousarray(samples[:, 0])),
        )
    return rows


def _decode(path: Path, mix: Callable[[np.ndarray], np.ndarray]) -> None:
    samples, rate = soundfile.read(path, dtype="float32")
    soxr.resample(mix(samples), rate, RATE)


def images(folder: Path) -> Rows:
    """Return for images, by step: transformers' documented loop, ours, and pillow's decoding and resizing alone."""
    path, *_ = paths = sorted((folder / "image").iterdir())[: BATCH["image"]]
    processor = CLIPImageProcessorPil()
    # As large as the processor makes a picture of 640 x 480, before it crops.
    size = (298, 224)

    def floor(paths: list[Path]) -> None:
        for path in paths:
            Image.open(path).resize(size, Image.Resampling.BICUBIC)

    return {
        "decode a JPEG": (
            lambda: Image.open(path).convert("RGB"),
            lambda: load_image(path),
            lambda: Image.open(path).load(),
        ),
        "decode and prepare a JPEG": (
            lambda: processor(Image.open(path), return_tensors="np"),
            lambda: extract_image(path, processor),
            lambda: floor([path]),
        ),
        f"decode and prepare {len(paths)} JPEGs in a batch": (
            lambda: processor([Image.open(path) for path in paths], return_tensors="np"),
            lambda: extract_images(paths, processor),
            lambda: floor(paths),
        ),
    }


class Batches:
    """The features of files, batch by batch, prepared when they are asked for, as a data set of torch."""

    def __init__(self, files: list[Path], size: int, prepare: Callable[[Path], Any]) -> None:
        self.groups = [files[first : first + size] for first in range(0, len(files), size)]
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Any:
        return [self.prepare(file) for file in self.groups[index]]


def in_parallel(folder: Path, clips: int) -> dict[str, Batches]:
    """Return, by step: what is prepared in threads and in processes."""
    recordings, pictures = sorted((folder / "audio").iterdir())[:clips], sorted((folder / "image").iterdir())
    extractor = ClapFeatureExtractor(truncation="fusion", frequency_min=50)
    processor = CLIPImageProcessorPil()
    waveform, picture = load_audio(recordings[0], RATE), load_image(pictures[0])
    audio, image = partial(Batches, recordings, BATCH["audio"]), partial(Batches, pictures, BATCH["image"])
    return {
        "decode and resample FLACs of 10 s": audio(lambda path: load_audio(path, RATE)),
        "log-mels of 10 s": audio(lambda path: extract_audio(waveform, extractor, RATE)),
        "FLACs of 10 s, both": audio(lambda path: extract_audio(path, extractor)),
        "decode JPEGs": image(lambda path: np.asarray(load_image(path))),
        "pixels of pictures": image(lambda path: extract_image(picture, processor)),
        "JPEGs, both": image(lambda path: extract_image(path, processor)),
    }


def _threads(prepared: Batches, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(prepared.__getitem__, range(len(prepared))):
            pass


def _exhaust(loader: Any) -> None:
    for _ in loader:
        pass


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds; a third of them for the last table")
    parser.add_argument("--clips", type=int, default=64, help="of the last table; four times as many pictures")
    parser.add_argument("--workers", type=int, default=2, help="threads, and processes, of the last table")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_files(folder, max(4 * arguments.clips, BATCH["image"]), arguments.clips)
        print(f"Front ends, SYNTHETIC clips and pictures\n{machine()}\n")
        print(f"{'milliseconds':<44}{'theirs':>9}{'ours':>9}{'ratio':>8}{'floor':>9}{'of ours':>9}")
        for rows in (log_mels(), decoding(folder), images(folder)):
            kinds = ("theirs", "ours", "floor")
            runs = {
                f"{name} {kind}": partial(_repeated, run)
                for name, row in rows.items()
                for kind, run in zip(kinds, row, strict=True)
            }
            seconds = alternate(runs, arguments.repeats)
            for name in rows:
                theirs, ours, floor = (1000 * seconds[f"{name} {kind}"] / CALLS for kind in kinds)
                print(f"{name:<44}{theirs:>9.2f}{ours:>9.2f}{theirs / ours:>8.2f}{floor:>9.2f}{floor / ours:>9.0%}")
            print()
        workers = arguments.workers
        title = f"items a second, and times as many in {workers}"
        print(f"{title:<44}{'1 thread':>9}{'threads':>9}{'1 process':>11}{'processes':>11}")
        for name, prepared in in_parallel(folder, arguments.clips).items():
            loaders = [
                DataLoader(
                    prepared,  # type: ignore[arg-type]
                    batch_size=None,
                    num_workers=count,
                    persistent_workers=True,
                    multiprocessing_context="fork",
                )
                for count in (1, workers)
            ]
            contenders = {
                "thread": partial(_threads, prepared, 1),
                "threads": partial(_threads, prepared, workers),
                "process": partial(_exhaust, loaders[0]),
                "processes": partial(_exhaust, loaders[1]),
            }
            items = sum(map(len, prepared.groups))
            seconds = alternate(contenders, max(arguments.repeats // 3, 1))
            rates = {kind: items / taken for kind, taken in seconds.items()}
            print(
                f"{name:<44}{rates['thread']:>9.0f}{rates['threads'] / rates['thread']:>9.2f}{rates['process']:>11.0f}"
                f"{rates['processes'] / rates['process']:>11.2f}"
            )
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
