"""Files in, embeddings out: `embed` against the plain loop of transformers' documentation, and against the cost of its
own parts.

SYNTHETIC files of common sizes (JPEGs of 640 x 480, FLACs of 10 s and 25 s at 44.1 kHz stereo) and random weights of
the sizes of CLIP ViT-B/32 and a fused CLAP HTSAT-tiny: speed depends on neither. Every contender is a process of its
own, in turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel
from transformers.utils import logging

from benchmarks.timing import machine
from cmcr_hf.cpu import tuned_cpu
from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio, extract_image
from cmcr_hf.modeling.image_loading_cmcr import load_image
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.training.data import Items
from cmcr_hf.training.embed import embed, encode_features
from cmcr_hf.training.recipe import DataSpec

BATCH = {"image": 32, "audio": 8}
CONTENDERS = ("plain", "float32", "tuned", "bfloat16")
TITLES = {
    "plain": "plain transformers, float32",
    "float32": "embed, float32",
    "tuned": "embed, float32 as `cmcr embed` sets it",
    "bfloat16": "embed, bfloat16, as `cmcr embed` sets it",
}


def write_files(folder: Path, images: int, clips: int) -> None:
    generator = np.random.default_rng(0)
    (folder / "image").mkdir()
    for number in range(images):
        coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "image" / f"{number:04d}.jpg", quality=85)
    for name, seconds in (("audio", 10), ("long", 25)):
        (folder / name).mkdir()
        for number in range(clips):
            steps = generator.normal(0, 0.05, (seconds * 44100, 2))
            smooth = np.cumsum(steps, axis=0) * np.exp(-np.arange(len(steps)) % 4410 / 2000)[:, None]
            samples = smooth / np.abs(smooth).max()
            soundfile.write(folder / name / f"{number:04d}.flac", samples.astype(np.float32), 44100)


def write_models(folder: Path) -> None:
    torch.manual_seed(0)
    # The defaults of transformers are the two models' own sizes.
    CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")
    CLIPImageProcessorPil().save_pretrained(folder / "clip")
    ClapModel(ClapConfig(audio_config={"enable_fusion": True})).save_pretrained(folder / "clap")
    ClapFeatureExtractor(truncation="fusion", frequency_min=50).save_pretrained(folder / "clap")


@torch.inference_mode()
def plain(folder: Path, modality: str, files: list[Path]) -> None:
    """Embed files as the documentation of transformers shows it, batch by batch."""
    if modality == "image":
        model: Any = CLIPModel.from_pretrained(folder / "clip").eval()
        processor: Any = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    else:
        model = ClapModel.from_pretrained(folder / "clap").eval()
        processor = ClapFeatureExtractor.from_pretrained(folder / "clap")
    timed(lambda part: plain_batch(model, processor, modality, part), files, BATCH[modality])


def plain_batch(model: Any, processor: Any, modality: str, files: list[Path]) -> None:
    if modality == "image":
        model.get_image_features(**processor([Image.open(path) for path in files], return_tensors="pt"))
        return
    import soxr

    clips = []
    for path in files:
        samples, rate = soundfile.read(path, dtype="float32")
        clips.append(soxr.resample(samples.mean(axis=1), rate, 48000))
    model.get_audio_features(**processor(clips, sampling_rate=48000, return_tensors="pt"))


def timed(run: Callable[[list[Path]], object], files: list[Path], batch: int) -> None:
    run(files[:batch])
    start = time.perf_counter()
    for first in range(0, len(files), batch):
        run(files[first : first + batch])
    print(json.dumps({"rate": len(files) / (time.perf_counter() - start)}))


def ours(folder: Path, name: str, modality: str, files: list[Path], contender: str) -> None:
    """Embed files as `cmcr embed` does, and tell what the parts cost one thread each."""
    dtype = torch.bfloat16 if contender == "bfloat16" else torch.float32
    space = "clip" if modality == "image" else "clap"
    model_class: Any = CLIPModel if modality == "image" else ClapModel
    model = model_class.from_pretrained(folder / space, dtype=dtype).eval()
    if modality == "image":
        processor = CMCRProcessor(image_processor=CLIPImageProcessorPil.from_pretrained(folder / space))
    else:
        processor = CMCRProcessor(feature_extractor=ClapFeatureExtractor.from_pretrained(folder / space))
    items = Items([DataSpec(folder=name)], modality, folder)
    store = folder / f"store-{os.getpid()}"

    def run() -> None:
        record = {"id": "random", "revision": "main", "config_hash": "0"}
        options = {"space": space, "record": record, "dim": 512, "batch_size": BATCH[modality], "progress": False}
        embed(model, processor, items, store, **options)
        shutil.rmtree(store)

    with nullcontext() if contender == "float32" else tuned_cpu():
        run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        print(json.dumps({"rate": len(files) / seconds, "parts": parts(model, processor, modality, files[:16])}))


@torch.inference_mode()
def parts(model: Any, processor: CMCRProcessor, modality: str, files: list[Path]) -> dict[str, float]:
    """Return core-milliseconds an item of decoding, features and model; the model's with all its threads busy."""
    prepare = "images" if modality == "image" else "audio"
    batch = processor(**{prepare: files[: BATCH[modality]]})
    threads = torch.get_num_threads()
    costs = {}
    encode_features(model, modality, batch)
    start = time.perf_counter()
    encode_features(model, modality, batch)
    costs["model"] = (time.perf_counter() - start) / BATCH[modality] * threads
    torch.set_num_threads(1)
    if modality == "image":
        steps: dict[str, Callable[[Any], Any]] = {
            "decode": load_image,
            "both": lambda path: extract_image(path, processor.image_processor),
        }
    else:
        extractor = processor.feature_extractor
        steps = {
            "decode": lambda path: load_audio(path, extractor.sampling_rate),
            "both": lambda path: extract_audio(path, extractor),
        }
    for name, step in steps.items():
        step(files[0])
        start = time.perf_counter()
        for path in files:
            step(path)
        costs[name] = (time.perf_counter() - start) / len(files)
    torch.set_num_threads(threads)
    costs["features"] = max(costs.pop("both") - costs["decode"], 0.0)
    return {name: 1000 * seconds for name, seconds in costs.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="JPEGs")
    parser.add_argument("--clips", type=int, default=48, help="FLACs of each length")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each contender")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.contender:
        contender, name, place = arguments.contender
        folder, modality = Path(place), "image" if name == "image" else "audio"
        files = sorted((folder / name).iterdir())
        if contender == "plain":
            plain(folder, modality, files)
        else:
            ours(folder, name, modality, files, contender)
        return
    with tempfile.TemporaryDirectory() as place:
        write_files(Path(place), arguments.images, arguments.clips)
        write_models(Path(place))
        print(f"Files in, embeddings out: SYNTHETIC files, RANDOM weights\n{machine()}")
        print(f"items a second, median of {arguments.repeats} processes each, in turns\n")
        for name, title in (("image", "640 x 480 JPEG"), ("audio", "10 s FLAC"), ("long", "25 s FLAC")):
            results: dict[str, list[dict[str, Any]]] = {}
            for _ in range(arguments.repeats):
                for contender in CONTENDERS:
                    command = [sys.executable, "-m", "benchmarks.embedding", "--contender", contender, name, place]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    results.setdefault(contender, []).append(json.loads(done.stdout.splitlines()[-1]))
            show(title, results)


def show(title: str, results: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{title:<44}{'rate':>8}{'x plain':>10}{'decode':>10}{'features':>10}{'model':>8}{'of the sum':>12}")
    rates = {name: statistics.median(run["rate"] for run in runs) for name, runs in results.items()}
    for name, runs in results.items():
        line = f"{TITLES[name]:<44}{rates[name]:>8.1f}{rates[name] / rates['plain']:>10.2f}"
        if "parts" in runs[0]:
            costs = {part: statistics.median(run["parts"][part] for run in runs) for part in runs[0]["parts"]}
            # What the parts would allow if every core were always busy.
            bound = 1000 * (torch.get_num_threads()) / sum(costs.values())
            line += (
                f"{costs['decode']:>10.1f}{costs['features']:>10.1f}{costs['model']:>8.1f}{rates[name] / bound:>11.0%}"
            )
        print(line)
    print()


if __name__ == "__main__":
    main()
