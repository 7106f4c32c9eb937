"""Files in, embeddings out: `embed` against the plain loop of transformers' documentation, against the steps of the
official pipelines where those are installed, and against the cost of its own parts.

SYNTHETIC files of common sizes (JPEGs of 640 x 480, FLACs of 10 s and 25 s at 44.1 kHz stereo, captions) and random
weights of the sizes of CLIP ViT-B/32 and a fused CLAP HTSAT-tiny: speed depends on neither. Every contender is a
process of its own, which has its models loaded; they take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import soundfile
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ClapFeatureExtractor,
    ClapModel,
    CLIPImageProcessorPil,
    CLIPModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from benchmarks.report import format_table
from benchmarks.sources import (
    add_sources_option,
    quiet_transformers,
    write_captions,
    write_clips,
    write_images,
    write_sources,
)
from benchmarks.timing import machine
from cmcr_hf.cpu import tuned_cpu
from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.configuration_cmcr import source_embedding_dim
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio, extract_image
from cmcr_hf.modeling.image_loading_cmcr import load_image
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.sources.upstream import import_upstream
from cmcr_hf.training.data import Items
from cmcr_hf.training.embed import embed, encode_features
from cmcr_hf.training.recipe import DataSpec

BATCH = {"text": 32, "image": 32, "audio": 8}
GPU_BATCH = {"text": 256, "image": 256, "audio": 64}
KINDS = {
    "text": "captions",
    "image": "640 x 480 JPEG",
    "audio": "10 s FLAC",
    "long": "25 s FLAC",
}
OFFICIAL = {"text": "open_clip", "image": "open_clip", "audio": "laion_clap", "long": "laion_clap"}
TITLES = {
    "plain": "plain transformers, float32",
    "padded": "plain transformers, padded to 77 tokens",
    "official": "{}'s steps, float32",
    "float32": "embed, float32",
    "tuned": "embed, float32 as `cmcr embed` sets it",
    "bfloat16": "embed, bfloat16, as `cmcr embed` sets it",
}
CAPTIONS = "text.txt"
LOOPS = ("plain", "padded", "official")
COLUMNS = {
    "what": ("", ""),
    "rate": ("items/s", ".1f"),
    "ratio": ("x plain", ".2f"),
    "decode": ("decode", ".1f"),
    "features": ("features", ".1f"),
    "model": ("model", ".1f"),
    "share": ("of their bound", ".0%"),
}
# Items whose decoding and features are timed on one thread.
SAMPLED = 16


def modality_of(kind: str) -> str:
    return "audio" if kind == "long" else kind


def write_files(folder: Path, images: int, clips: int, kinds: Iterable[str] = ("image", "audio", "long")) -> None:
    """Write the files of each of the kinds, in a folder of its name."""
    for kind in kinds:
        if kind == "image":
            write_images(folder / kind, images)
        else:
            write_clips(folder / kind, clips, 10 if kind == "audio" else 25)


def read_items(folder: Path, kind: str) -> list[Any]:
    if kind == "text":
        return (folder / CAPTIONS).read_text(encoding="utf-8").split("\n")
    return sorted((folder / kind).iterdir())


class Contender:
    """A way to embed all items of a kind, in this process: `turn()` does it once and returns its seconds.

    Args:
        name: of `TITLES`.
        folder: with the items of the kind, and the sources.
    """

    def __init__(self, name: str, kind: str, folder: Path, sources: Path, device: str) -> None:
        self.kind, self.modality, self.folder = kind, modality_of(kind), folder
        self.values, self.device = read_items(folder, kind), device
        self.batch = (BATCH if device == "cpu" else GPU_BATCH)[self.modality]
        self._set_cpu = tuned_cpu if name in ("tuned", "bfloat16") and device == "cpu" else nullcontext
        space = "clap" if self.modality == "audio" else "clip"
        if name == "official":
            self._embed_batch = OFFICIAL_STEPS[self.modality](device)
        else:
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            model_class: Any = CLIPModel if space == "clip" else ClapModel
            self.model = model_class.from_pretrained(sources / space, dtype=dtype).eval().to(device)
            self._embed_batch = plain_steps(self.model, sources / space, self.modality, name == "padded", device)
        self._is_loop = name in LOOPS
        if not self._is_loop:
            self.processor = CMCRProcessor.from_sources_pretrained(**{space: sources / space})
            self._space = space
        self.embed_first(self.batch)

    def turn(self) -> float:
        with _timed() as seconds:
            self.embed_first(len(self.values))
        return seconds[0]

    def embed_first(self, number: int) -> None:
        """Embed the first so many items."""
        if not self._is_loop:
            with self._set_cpu():
                self._run_embed(number)
            return
        with torch.inference_mode():
            for first in range(0, number, self.batch):
                self._embed_batch(self.values[first : min(first + self.batch, number)])

    def _run_embed(self, number: int) -> None:
        store = self.folder / f"store-{os.getpid()}"
        named: dict[str, Any] = {"table": CAPTIONS} if self.kind == "text" else {"folder": self.kind}
        items = Items([DataSpec(**named, limit=number)], self.modality, self.folder)
        embed(
            self.model,
            self.processor,
            items,
            store,
            space=self._space,
            record={"id": "random", "revision": "main", "config_hash": "0"},
            dim=source_embedding_dim(self.model.config) or 0,
            batch_size=self.batch,
            progress=False,
        )
        shutil.rmtree(store)

    @torch.inference_mode()
    def parts(self) -> dict[str, float]:
        """Return core-milliseconds an item of decoding, features and model, this one's with all its threads busy.

        On a GPU, the model's milliseconds are that one's.
        """
        threads = torch.get_num_threads()
        some = self.values[:SAMPLED]
        batches = [self._prepare(values) for values in self._batches()]
        with self._set_cpu(), _timed() as model:
            for batch in batches:
                encode_features(self.model, self.modality, batch).cpu()
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        torch.set_num_threads(1)
        seconds = []
        for step in self._steps():
            with _timed() as spent:
                for value in some:
                    step(value)
            seconds.append(spent[0])
        torch.set_num_threads(threads)
        decode, both = seconds
        costs = {
            "decode": decode / len(some),
            "features": max(both - decode, 0.0) / len(some),
            "model": model[0] / rows * (threads if self.device == "cpu" else 1),
        }
        return {part: 1000 * value for part, value in costs.items()}

    def _prepare(self, values: list[Any]) -> Any:
        if self.modality == "text":
            return self.processor(text=values, space=self._space)
        return self.processor(images=values) if self.modality == "image" else self.processor(audio=values)

    def _batches(self) -> list[list[Any]]:
        """Return what the model is timed with: a batch, of texts four, from the shortest to the longest."""
        if self.modality != "text":
            return [self.values[: self.batch]]
        texts = sorted(self.values, key=len)[:: max(len(self.values) // (4 * self.batch), 1)]
        return [texts[first : first + self.batch] for first in range(0, len(texts), self.batch)]

    def _steps(self) -> tuple[Callable[[Any], object], Callable[[Any], object]]:
        """Return what decodes an item, and what makes its features beside."""
        if self.modality == "text":
            return lambda text: None, lambda text: self._prepare([text])
        if self.modality == "image":
            return load_image, lambda path: extract_image(path, self.processor.image_processor)
        extractor = self.processor.feature_extractor
        return lambda path: load_audio(path, extractor.sampling_rate), lambda path: extract_audio(path, extractor)


@contextmanager
def _timed() -> Iterator[list[float]]:
    """Give a list that holds the seconds of the context once it has ended."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    seconds.append(time.perf_counter() - start)


def plain_steps(
    model: Any, folder: Path, modality: str, padded: bool = False, device: str = "cpu"
) -> Callable[[list[Any]], torch.Tensor]:
    """Return what embeds a batch as the documentation of transformers shows it."""
    if modality == "text":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        padding = "max_length" if padded else True

        def embed_texts(values: list[Any]) -> torch.Tensor:
            inputs = tokenizer(values, padding=padding, truncation=True, return_tensors="pt")
            return model.get_text_features(**inputs.to(device)).pooler_output.cpu()

        return embed_texts
    if modality == "image":
        processor = CLIPImageProcessorPil.from_pretrained(folder)

        def embed_images(values: list[Any]) -> torch.Tensor:
            inputs = processor([Image.open(path) for path in values], return_tensors="pt")
            return model.get_image_features(**inputs.to(device)).pooler_output.cpu()

        return embed_images
    import soxr

    extractor = ClapFeatureExtractor.from_pretrained(folder)
    wanted = extractor.sampling_rate

    def embed_clips(values: list[Any]) -> torch.Tensor:
        clips = []
        for path in values:
            samples, rate = soundfile.read(path, dtype="float32")
            clips.append(soxr.resample(samples.mean(axis=1), rate, wanted))
        inputs = extractor(clips, sampling_rate=wanted, return_tensors="pt")
        return model.get_audio_features(**inputs.to(device)).pooler_output.cpu()

    return embed_clips


def open_clip_texts(device: str) -> Callable[[list[Any]], torch.Tensor]:
    open_clip: Any = import_upstream("open_clip", "open-clip")
    model = open_clip.create_model("ViT-B-32", device=device).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return lambda values: model.encode_text(tokenizer(values).to(device)).cpu()


def open_clip_images(device: str) -> Callable[[list[Any]], torch.Tensor]:
    open_clip: Any = import_upstream("open_clip", "open-clip")
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", device=device)
    model.eval()

    def embed_images(values: list[Any]) -> torch.Tensor:
        pixels = torch.stack([preprocess(Image.open(path)) for path in values])
        return model.encode_image(pixels.to(device)).cpu()

    return embed_images


def laion_clap_clips(device: str) -> Callable[[list[Any]], torch.Tensor]:
    with _nothing_by_name():
        laion_clap: Any = import_upstream("laion_clap", "laion-clap")
        module = laion_clap.CLAP_Module(enable_fusion=True, amodel="HTSAT-tiny", device=device)
    module.model.eval()
    return lambda values: torch.from_numpy(module.get_audio_embedding_from_filelist([str(path) for path in values]))


@contextmanager
def _nothing_by_name() -> Iterator[None]:
    """Keep laion_clap, when it is imported, from fetching tokenizers, and weights that a checkpoint would replace."""
    import transformers

    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    with ExitStack() as stack:
        for tokenizer in (BertTokenizer, RobertaTokenizer, transformers.BartTokenizer):
            stack.enter_context(patch.object(tokenizer, "from_pretrained", lambda *_: None))
        stack.enter_context(patch.object(RobertaModel, "from_pretrained", lambda *_: RobertaModel(config)))
        yield


OFFICIAL_STEPS: dict[str, Callable[[str], Callable[[list[Any]], torch.Tensor]]] = {
    "text": open_clip_texts,
    "image": open_clip_images,
    "audio": laion_clap_clips,
}


class Worker:
    """A contender in a process of its own, which waits for its turns."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "benchmarks.embedding", "--contender", *map(str, arguments)]
        # What upstream packages warn of concerns their authors.
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> Any:
        assert self._process.stdin and self._process.stdout
        if what != "ready":
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process of {self._process.args!r} ended with status {self._process.wait()}.")
        return json.loads(answer)

    def close(self) -> None:
        # A worker ends where its input does.
        self._process.communicate()


def work(arguments: list[str]) -> None:
    """Answer the questions of the standard input, a line each."""
    name, kind, folder, sources, device = arguments
    answers = sys.stdout
    # laion_clap prints.
    with redirect_stdout(sys.stderr):
        contender = Contender(name, kind, Path(folder), Path(sources), device)
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(getattr(contender, line.strip())()), file=answers, flush=True)


def bound(costs: dict[str, float], device: str) -> float:
    """Return the items a second that the parts would allow if every core, or the GPU, were always busy."""
    before = costs["decode"] + costs["features"]
    if device == "cpu":
        return 1000 * torch.get_num_threads() / (before + costs["model"])
    return 1000 / max(costs["model"], before / (os.cpu_count() or 1))


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", action="append", choices=KINDS, help="measure these alone")
    parser.add_argument("--texts", type=int, default=256, help="captions")
    parser.add_argument("--images", type=int, default=128, help="JPEGs")
    parser.add_argument("--clips", type=int, default=32, help="FLACs of each length")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    add_sources_option(parser)
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    quiet_transformers()
    if arguments.contender:
        work(arguments.contender)
        return []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = arguments.sources or write_sources(folder / "sources")
        kinds = arguments.only or list(KINDS)
        write_captions(folder / CAPTIONS, arguments.texts)
        write_files(folder, arguments.images, arguments.clips, [kind for kind in kinds if kind != "text"])
        print(f"Files in, embeddings out: SYNTHETIC items, RANDOM weights\n{machine(arguments.device)}")
        print(f"medians of {arguments.repeats} turns, a process each; parts in core-milliseconds an item\n")
        for kind in kinds:
            found = _measure(kind, folder, sources, arguments.device, arguments.repeats)
            columns = COLUMNS | {"what": (KINDS[kind], "")}
            if kind == "text":
                del columns["decode"]
            print(format_table(found, columns), end="\n\n", flush=True)
            rows += found
    return rows


def _measure(kind: str, folder: Path, sources: Path, device: str, repeats: int) -> list[dict[str, Any]]:
    names = [name for name in TITLES if name != "padded" or kind == "text"]
    if device != "cpu":
        names.remove("tuned")
    if importlib.util.find_spec(OFFICIAL[kind]) is None:
        print(f"Skipped, not installed: {OFFICIAL[kind]}.")
        names.remove("official")
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            workers[name] = Worker(name, kind, folder, sources, device)
        for worker in workers.values():
            worker.ask("ready")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in names if name not in LOOPS}
        for _ in range(repeats):
            for name, worker in workers.items():
                seconds[name].append(worker.ask("turn"))
                if name in costs:
                    costs[name].append(worker.ask("parts"))
    finally:
        for worker in workers.values():
            worker.close()
    items = len(read_items(folder, kind))
    rates = {name: items / statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, rate in rates.items():
        title = TITLES[name].format(OFFICIAL[kind])
        if device != "cpu":
            title = title.removesuffix(", as `cmcr embed` sets it")
        row = {"kind": kind, "what": title, "rate": rate, "ratio": rate / rates["plain"], "seconds": seconds[name]}
        if name in costs:
            parts = {part: statistics.median(cost[part] for cost in costs[name]) for part in costs[name][0]}
            row |= parts | {"share": rate / bound(parts, device)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
