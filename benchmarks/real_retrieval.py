"""Does C-MCR connect real images and sounds through text alone? Two small sources are trained, connected and measured.

The sources. An image-text model learns from Tiny ImageNet and Caltech-101 images with captions made from their labels,
an audio-text model from the log-mels of ESC-50 (folds 1 to 3) with captions made from theirs. Each is a CNN that
learns to tell its classes apart, and then a text tower that learns, contrastively, to meet it. The two text towers
differ in tokens (words; byte pairs), architecture (a bag; attention) and seed, and neither model sees the other's
items, so that their spaces are unrelated. A label has few words. So each text tower stands on word vectors factorised
from real texts (captions, labels, sentences of an ontology; no item belongs to any of them), which carry it to words
that it was not trained on, and words of unrelated real captions stand around the phrases of its training captions.

The connection. Texts alone: the names of the 17 concepts that both sides share, in 12 sentences each, or real captions
and labels. Image memory: the training images, those of other things included. Audio memory: folds 1 to 3. No
audio-image pair and no class label of an item enters. The recipe of C-MCR is the paper's: the defaults of
`CMCRConfig`, AdamW, 1e-3 with cosine decay, tau 1 = 0.01, 36 epochs of captions, as many steps of names. Bridge
distillation has the defaults of its objective and 24 epochs of the images, which are half as many steps.

The measurement. Clips of fold 5 against images that a hash of their file name holds back, by concept. This is a
development split: the settings of the sources were chosen on it. Its figures say that the method works, not how well
it would on other data.

Sources and embeddings are cached below --cache, in a folder of their own for every setting that they depend on, and a
run that was stopped goes on behind the last of them that is complete. Connectors are trained anew each time. Example:

    python -m benchmarks.real_retrieval --data ../shared/data --output runs/real_retrieval/table.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers.utils import logging

from benchmarks.real.captions import NAME_TEMPLATES
from benchmarks.real.data import FILES, Items, check_data, read_concepts, read_images, read_sounds, read_texts
from benchmarks.real.sources import embed_items, embed_texts, load_source, train_sources
from benchmarks.real.training import SourceTraining
from benchmarks.timing import machine
from cmcr_hf import CMCRConfig
from cmcr_hf.cpu import tuned_cpu
from cmcr_hf.evaluation.baselines import derange_by_name, posterior_matching
from cmcr_hf.evaluation.connection import (
    ROWS,
    Metrics,
    RetrievalSet,
    Side,
    baseline_metrics,
    connector_metrics,
    format_table,
    mean_and_spread,
    retrieval_metrics,
)
from cmcr_hf.output import write_json
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.embed import source_record
from cmcr_hf.training.store import EmbeddingStore
from cmcr_hf.training.train import ConnectorTrainingArguments, run_script, train_connector


@dataclass(frozen=True)
class Schedule:
    """How long a connector trains on a text set."""

    batch_size: int
    epochs: int


# To be raised with any change below benchmarks/real that makes other sources of the same settings.
SOURCES_VERSION = 1
SOURCES = {
    "clip": SourceTraining(epochs=28, batch_size=64, learning_rate=1.5e-3, seed=11),
    "clap": SourceTraining(epochs=130, batch_size=32, learning_rate=1.5e-3, mixup=0.4, seed=22),
}
# 36 epochs of 19,000 captions are 1332 steps, and so are 444 epochs of 204 sentences around names.
SCHEDULES = {"names": Schedule(batch_size=68, epochs=444), "captions": Schedule(batch_size=512, epochs=36)}
# 24 epochs of 13,500 images are 624 steps: `train_connector` counts the items of the larger memory.
DISTILLATION = Schedule(batch_size=512, epochs=24)
# The order that `train_connector` wants, which no file keeps.
CONNECTION = ("clip_text", "clap_text", "clip_image", "clap_audio")
# The parts of the development split: a setting that is chosen on one is confirmed on the other.
WHOLE, HALVES = "all", ("first half", "second half")
TITLES = {"names": "17 names", "captions": "captions"}
# With all image captions and labels, 19,000 texts.
SOUND_CAPTIONS = 12_000
# Around a label of ESC-50, for the zero-shot figure; the concepts have NAME_TEMPLATES.
SOUND_PROMPTS = ("{}", "the sound of {}", "{} in the background")
# Floor, expected and stretch; of the mAP in both directions, and of its share of the closed cascade.
DISTILLATION_TARGETS: dict[str, dict[str, list[tuple[float, ...]]]] = {
    TITLES["captions"]: {"mAP": [(0.35, 0.40), (0.42, 0.47)], "share": [(0.75, 0.84, 0.95)]},
    TITLES["names"]: {"mAP": [(0.44, 0.49, 0.50), (0.46, 0.52, 0.55)], "share": [(0.95, 1.03, 1.10)]},
}
NOTES = """
The closed rows know the 17 names, no other baseline does: these use the captions and labels as their bank. ridge and
procrustes are maps fitted on them. C-MCR and bridge distillation connect through texts alone, and need their two
projectors at inference. The null is
C-MCR whose texts meet those of another concept. PM: posterior matching.
"""


@dataclass
class TextSet:
    """Texts that connect the spaces, in both of them, `(texts, dim)` unit rows, and what each text is about."""

    clip: torch.Tensor
    clap: torch.Tensor
    about: list[str]


@dataclass
class Embeddings:
    """All that the experiments need of the sources, as unit rows, and the zero-shot accuracy of each source."""

    image_memory: torch.Tensor
    audio_memory: torch.Tensor
    names: TextSet
    captions: TextSet
    items: RetrievalSet
    zero_shot: dict[str, float]
    # Rows of the clips and of the images, by the name of the part.
    halves: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)


def name_sentences(data: Path) -> tuple[list[str], list[str]]:
    """Return the sentences around the names of the concepts, and the name that each is about."""
    names = [name for name in read_concepts(data) for _ in NAME_TEMPLATES]
    return [NAME_TEMPLATES[row % len(NAME_TEMPLATES)].format(name) for row, name in enumerate(names)], names


def real_texts(data: Path) -> list[str]:
    """Return captions of sounds (a fixed draw of them), captions of images and labels: no item belongs to any."""
    texts = read_texts(data)
    sounds = random.Random(0).sample(texts.sound_captions, min(SOUND_CAPTIONS, len(texts.sound_captions)))
    return list(dict.fromkeys([*sounds, *texts.image_captions, *texts.labels]))


def _keyed(data: Path, cache: Path, settings: dict[str, SourceTraining]) -> tuple[dict[str, Any], Path]:
    """Return all that the sources depend on, and the folder of the cache that is theirs."""
    key = {
        "version": SOURCES_VERSION,
        "sources": {space: asdict(setting) for space, setting in settings.items()},
        "bytes": {name: (data / name).stat().st_size for name in FILES},
    }
    return key, cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def sources_folder(data: Path, cache: Path, settings: dict[str, SourceTraining]) -> Path:
    """Return the folder that `prepare` keeps the sources in."""
    return _keyed(data, cache, settings)[1]


def prepare(data: Path, cache: Path, settings: dict[str, SourceTraining]) -> Embeddings:
    """Train the sources and embed the data with them, except for what the cache holds of it."""
    key, folder = _keyed(data, cache, settings)
    write_json(folder / "settings.json", key)
    train_sources(data, folder, settings)

    images, sounds = read_images(data), read_sounds(data)
    sentences, about = name_sentences(data)
    captions = real_texts(data)
    prompts = [template.format(label) for label in sounds.labels for template in SOUND_PROMPTS]
    clip, clap = Source(folder, "clip"), Source(folder, "clap")
    names = TextSet(clip.texts("names", sentences), clap.texts("names", sentences), about)
    bank = TextSet(clip.texts("captions", captions), clap.texts("captions", captions), captions)
    image = clip.items("held-back", "image", images.held_back)
    audio = clap.items("held-back", "audio", sounds.held_back)
    names_clip, names_clap = (_mean_of(part, len(NAME_TEMPLATES)) for part in (names.clip, names.clap))
    with_concept = [row for row, concept in enumerate(sounds.held_back.concepts) if concept]
    concepts = list(dict.fromkeys(about))
    image_classes = torch.tensor([concepts.index(concept) for concept in images.held_back.concepts])
    keys = [sounds.held_back.keys[row] for row in with_concept], images.held_back.keys
    return Embeddings(
        image_memory=clip.items("memory", "image", images.training),
        audio_memory=clap.items("memory", "audio", sounds.training),
        names=names,
        captions=bank,
        items=RetrievalSet(
            Side("clap", "audio", audio[with_concept], [sounds.held_back.concepts[row] for row in with_concept]),
            Side("clip", "image", image, images.held_back.concepts),
            query_bank=bank.clap,
            gallery_bank=bank.clip,
            query_names=names_clap,
            gallery_names=names_clip,
        ),
        halves={name: (_half(keys[0], bit), _half(keys[1], bit)) for bit, name in enumerate(HALVES)},
        zero_shot={
            "clip": _accuracy(image, names_clip, image_classes),
            "clap": _accuracy(
                audio, _mean_of(clap.texts("prompts", prompts), len(SOUND_PROMPTS)), sounds.held_back.classes
            ),
        },
    )


def _half(keys: Sequence[str], bit: int) -> list[int]:
    """Return the rows whose keys have a sha256 with this lowest bit in its first byte."""
    return [row for row, key in enumerate(keys) if hashlib.sha256(key.encode()).digest()[0] & 1 == bit]


def parts_of(items: RetrievalSet, halves: dict[str, tuple[Sequence[int], Sequence[int]]]) -> dict[str, RetrievalSet]:
    """Return the whole and its halves, of which each has its rows of both sides, and all banks and names."""
    parts = {WHOLE: items}
    for name, rows in halves.items():
        query, gallery = (
            replace(side, embeds=side.embeds[list(own)], labels=[side.labels[row] for row in own])
            for side, own in zip((items.query, items.gallery), rows, strict=True)
        )
        parts[name] = replace(items, query=query, gallery=gallery)
    return parts


class Source:
    """A trained source that embeds into stores beside it."""

    def __init__(self, folder: Path, space: str) -> None:
        self.folder, self.space = folder, space
        self.model, self.tokenizer = load_source(folder, space)
        self.record = source_record(str(folder / space), None, self.model)

    def items(self, name: str, modality: str, items: Items) -> torch.Tensor:
        return self._stored(name, modality, items.keys, lambda: embed_items(self.model, items.values))

    def texts(self, name: str, texts: list[str]) -> torch.Tensor:
        return self._stored(name, "text", texts, lambda: embed_texts(self.model, self.tokenizer, texts))

    def _stored(self, name: str, modality: str, keys: list[str], embed: Callable[[], torch.Tensor]) -> torch.Tensor:
        fingerprint = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
        store = EmbeddingStore.create(
            # Other texts of the same name get a store of their own.
            self.folder / "stores" / f"{self.space}-{name}-{fingerprint[:8]}",
            space=self.space,
            modality=modality,
            source=self.record,
            dim=self.model.config.projection_dim,
            data_fingerprint=fingerprint,
        )
        if not store.complete:
            store.append(embed(), keys)
            store.finish()
        return store.tensor()


def _mean_of(embeds: torch.Tensor, templates: int) -> torch.Tensor:
    """Average the sentences of each name: `(names * templates, dim)` to `(names, dim)` unit rows."""
    return F.normalize(embeds.view(-1, templates, embeds.shape[1]).mean(dim=1), dim=1)


def _accuracy(embeds: torch.Tensor, prompts: torch.Tensor, classes: torch.Tensor) -> float:
    return ((embeds @ prompts.T).argmax(dim=1) == classes).float().mean().item()


@dataclass(frozen=True)
class Run:
    """A connector to train: on which texts, from which seed, how, and whether each text meets one of another name."""

    texts: str
    seed: int
    deranged: bool = False
    objective: str = "c-mcr"

    @property
    def row(self) -> str:
        method = ROWS[self.objective]
        if self.deranged:
            method = "null" if self.objective == "c-mcr" else f"null of {method}"
        return f"{method}, {TITLES[self.texts]}"

    @property
    def schedule(self) -> Schedule:
        return DISTILLATION if self.objective == "bridge-distillation" else SCHEDULES[self.texts]


def connect(run: Run, folder: Path) -> dict[str, Metrics]:
    """Train a connector and measure it on every part, with what `experiment` wrote to `folder`."""
    schedule = run.schedule
    embeds = safetensors.torch.load_file(folder / f"{run.texts}.safetensors")
    items = safetensors.torch.load_file(folder / "items.safetensors")
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    if run.objective == "bridge-distillation":
        embeds |= {name: items[f"memory/{name}"] for name in ("clip_image", "clap_audio")}
    if run.deranged:
        order = derange_by_name(words[run.texts], torch.Generator().manual_seed(run.seed))
        # Both vectors of a text in the audio space move together: only the pairing of the spaces is broken.
        moved = ["clap_text"] if run.objective == "bridge-distillation" else ["clap_text", "clap_audio"]
        embeds |= {name: embeds[name][order] for name in moved}
    # Of the paper's width: that of these sources, 128, trains in half the time, but loses .02 of mAP with captions.
    projectors = {space: {"input_dim": embeds[f"{space}_text"].shape[1]} for space in SOURCES}
    config = CMCRConfig(objective=run.objective, projectors=projectors)
    # Models this small cost more to hand to a second thread than to compute.
    torch.set_num_threads(1)
    # A folder of its own: several connectors train at once.
    with tempfile.TemporaryDirectory(dir=folder) as output_dir, tuned_cpu():
        args = ConnectorTrainingArguments(
            output_dir=output_dir,
            num_train_epochs=schedule.epochs,
            per_device_train_batch_size=schedule.batch_size,
            seed=run.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        connector, _ = train_connector(config, {name: embeds[name] for name in CONNECTION}, args, log_lines=False)
    held_back = RetrievalSet(
        Side("clap", "audio", items["audio"], words["audio"]),
        Side("clip", "image", items["image"], words["image"]),
        query_bank=embeds["clap_text"],
        gallery_bank=embeds["clip_text"],
    )
    parts = parts_of(held_back, words["halves"])
    return {name: connector_metrics(connector, [part]) for name, part in parts.items()}


def connection_data(embeddings: Embeddings, texts: TextSet) -> dict[str, torch.Tensor]:
    """Return all that a connector trains on, row by row: each text in both spaces and its two pseudo items."""
    return {
        "clip_text": texts.clip,
        "clap_text": texts.clap,
        "clip_image": aggregate(texts.clip, embeddings.image_memory, temperature=0.01, normalize=True),
        "clap_audio": aggregate(texts.clap, embeddings.audio_memory, temperature=0.01, normalize=True),
    }


def experiment(
    embeddings: Embeddings,
    texts: Sequence[str],
    seeds: int,
    derangements: int,
    *,
    workers: int,
    objectives: Sequence[str] = ("c-mcr", "bridge-distillation"),
) -> dict[str, tuple[dict[str, Metrics], dict[str, Metrics]]]:
    """Measure every way to connect the spaces; return the means and standard deviations of its runs, part by part.

    Connectors are trained anew each time, `workers` of them at once in processes of one thread; one worker is this
    process itself.
    """
    items = embeddings.items
    tables = {name: _free_metrics(part) for name, part in parts_of(items, embeddings.halves).items()}
    audio, image = items.query, items.gallery
    runs = [Run(name, seed, objective=how) for how in objectives for name in texts for seed in range(seeds)]
    if "names" in texts:
        runs += [Run("names", draw, True, how) for how in objectives for draw in range(derangements)]
    results: dict[str, list[dict[str, Metrics]]] = {run.row: [] for run in runs}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        words: dict[str, Any] = {"audio": list(audio.labels), "image": list(image.labels), "halves": embeddings.halves}
        for text_set in texts:
            bank: TextSet = getattr(embeddings, text_set)
            words[text_set] = bank.about
            safetensors.torch.save_file(connection_data(embeddings, bank), folder / f"{text_set}.safetensors")
        memories = {
            "memory/clip_image": embeddings.image_memory.contiguous(),
            "memory/clap_audio": embeddings.audio_memory.contiguous(),
        }
        rows = {"audio": audio.embeds, "image": image.embeds, **memories}
        safetensors.torch.save_file(rows, folder / "items.safetensors")
        write_json(folder / "words.json", words)
        work: Callable[..., Iterator[dict[str, Metrics]]] = map
        if workers > 1:
            work = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn"))).map
        measured = work(connect, runs, [folder] * len(runs))
        for run, metrics in zip(runs, tqdm(measured, desc="connectors", total=len(runs), unit="run"), strict=True):
            results[run.row].append(metrics)
    found = {}
    for part, table in tables.items():
        spread: dict[str, Metrics] = {}
        for row, metrics in results.items():
            table[row], deviation = mean_and_spread([run[part] for run in metrics])
            if len(metrics) > 1:
                spread[row] = deviation
        found[part] = (table, spread)
    return found


def _free_metrics(items: RetrievalSet) -> dict[str, Metrics]:
    """Measure what trains no connector."""
    if items.query_names is None or items.gallery_names is None:
        raise ValueError("The retrieval set has no class names, expected them for the rows that know the classes.")
    table = baseline_metrics([items])
    matched = posterior_matching(items.query.embeds, items.query_names, items.gallery_names, items.gallery.embeds)
    table["closed PM"] = retrieval_metrics(matched, matched.T, items.query.labels, items.gallery.labels)
    return table


@dataclass(frozen=True)
class Target:
    """A figure, and what it was to reach; `None` where only a floor (or, below, a ceiling) was set."""

    name: str
    value: float
    floor: float
    expected: float | None = None
    stretch: float | None = None
    below: bool = False

    def __str__(self) -> str:
        parts = []
        for level in ("floor", "expected", "stretch"):
            bound = getattr(self, level)
            if bound is not None:
                met = self.value <= bound if self.below else self.value >= bound
                label = "at most" if self.below else level
                parts.append(f"{label} {bound:.2f}: {'met' if met else 'NOT met'}")
        return f"{self.name:62} {self.value:.3f}  {', '.join(parts)}"


def targets(table: dict[str, Metrics], zero_shot: dict[str, float]) -> list[Target]:
    """Set the figures of a table beside what they were to reach."""
    there, back = "audio_to_image", "image_to_audio"
    found = [
        Target("zero-shot, audio-text model, 50 classes", zero_shot["clap"], 0.55, 0.65, 0.75),
        Target("zero-shot, image-text model, 17 concepts", zero_shot["clip"], 0.50, 0.62, 0.70),
    ]
    for way in (there, back):
        distance = abs(table["unconnected"][way]["mAP"] - table["chance"][way]["mAP"])
        found.append(Target(f"unconnected, {_shown(way)}: mAP off chance", distance, 0.04, below=True))
    names, captions, null = (f"C-MCR, {TITLES['names']}", f"C-MCR, {TITLES['captions']}", f"null, {TITLES['names']}")
    if null in table:
        found.append(Target(f"null, {_shown(there)}: mAP", table[null][there]["mAP"], 0.09, below=True))
    if names in table:
        found.append(Target(f"{names}, {_shown(there)}: mAP", table[names][there]["mAP"], 0.33, 0.40, 0.45))
        found.append(Target(f"{names}, {_shown(back)}: mAP", table[names][back]["mAP"], 0.33, 0.40, 0.49))
    if captions in table:
        found.append(Target(f"{captions}, {_shown(there)}: mAP", table[captions][there]["mAP"], 0.24, 0.30, 0.34))
        found.append(Target(f"{captions}, {_shown(back)}: mAP", table[captions][back]["mAP"], 0.28, 0.37, 0.40))
    if names in table:
        for way in (there, back):
            share = table[names][way]["mAP"] / table["closed cascade"][way]["mAP"]
            found.append(Target(f"{names}, {_shown(way)}: share of the closed cascade", share, 0.70, 0.85, 1.0))
    for title, levels in DISTILLATION_TARGETS.items():
        row = f"{ROWS['bridge-distillation']}, {title}"
        if row not in table:
            continue
        for way, bounds in zip((there, back), levels["mAP"], strict=True):
            found.append(Target(f"{row}, {_shown(way)}: mAP", table[row][way]["mAP"], *bounds))
        for way in (there, back):
            share = table[row][way]["mAP"] / table["closed cascade"][way]["mAP"]
            found.append(Target(f"{row}, {_shown(way)}: share of the closed cascade", share, *levels["share"][0]))
            if title == TITLES["captions"]:
                share = table[row][way]["mAP"] / table["posterior matching"][way]["mAP"]
                found.append(Target(f"{row}, {_shown(way)}: share of posterior matching", share, 0.92, 0.98, 1.0))
    return found


def _shown(way: str) -> str:
    return way.replace("_to_", " -> ")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=NOTES
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with concepts.json, images, audio and text")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/real_retrieval"), help="folder of the cache (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write the table, the figures and the settings to this JSON file")
    parser.add_argument(
        "--texts", nargs="+", choices=TITLES, default=list(TITLES), help="text sets that connect (default: both)"
    )
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=("c-mcr", "bridge-distillation"),
        default=["c-mcr", "bridge-distillation"],
        help="what to train (default: both)",
    )
    parser.add_argument("--seeds", type=_positive, default=5, help="connectors a text set (default: %(default)s)")
    parser.add_argument(
        "--derangements", type=int, default=20, help="connectors of the null, 0 for none (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=_positive, default=2, help="connectors trained at once, a core each (default: %(default)s)"
    )
    for space, kind in (("clip", "image"), ("clap", "audio")):
        default = SOURCES[space].epochs
        parser.add_argument(
            f"--{kind}-epochs", type=_positive, default=default, help=f"of the {kind}-text model (default: {default})"
        )
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    check_data(arguments.data)
    settings = {
        "clip": replace(SOURCES["clip"], epochs=arguments.image_epochs),
        "clap": replace(SOURCES["clap"], epochs=arguments.audio_epochs),
    }
    start = time.perf_counter()
    embeddings = prepare(arguments.data, arguments.cache, settings)
    prepared = time.perf_counter()
    found = experiment(
        embeddings,
        list(dict.fromkeys(arguments.texts)),
        arguments.seeds,
        arguments.derangements,
        workers=arguments.workers,
        objectives=list(dict.fromkeys(arguments.objectives)),
    )
    end = time.perf_counter()
    (table, spread), items = found[WHOLE], embeddings.items
    reached = targets(table, embeddings.zero_shot)
    print(
        f"Retrieval by concept among {len(items.gallery.labels)} images and {len(items.query.labels)} clips of "
        f"{len(set(items.gallery.labels))} concepts, all held back.\nReal data; small sources trained on it for this "
        f"table. Development split, {arguments.seeds} seeds a connector, mean ± standard deviation.\n{machine()}\n"
    )
    print(format_table(table, spread))
    print(NOTES)
    print("\n".join(str(target) for target in reached))
    for name in HALVES:
        print(f"\nThe {name} of the clips and the images, by a hash of their names\n")
        print(format_table(*found[name]))
    print(f"\nSources and embeddings {prepared - start:.0f} s, connectors {end - prepared:.0f} s.")
    if arguments.output is not None:
        document = {
            "mean": table,
            "standard_deviation": spread,
            "zero_shot": embeddings.zero_shot,
            "targets": [asdict(target) for target in reached],
            "halves": {name: dict(zip(("mean", "standard_deviation"), found[name], strict=True)) for name in HALVES},
            "sources": {space: asdict(setting) for space, setting in settings.items()},
            "schedules": {name: asdict(SCHEDULES[name]) for name in arguments.texts},
            "distillation": asdict(DISTILLATION),
            "seeds": arguments.seeds,
            "derangements": arguments.derangements,
            "seconds": {"sources and embeddings": prepared - start, "connectors": end - prepared},
        }
        write_json(arguments.output, document)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


if __name__ == "__main__":
    run_script(main)
