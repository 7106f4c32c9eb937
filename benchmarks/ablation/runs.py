"""Train a connector in one way and from one seed, and measure it; what was measured once is kept."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import safetensors.torch
import torch

from cmcr_hf import CMCRConfig
from cmcr_hf.cpu import tuned_cpu
from cmcr_hf.evaluation.baselines import derange_by_name
from cmcr_hf.evaluation.connection import Metrics, RetrievalSet, Side, connector_metrics
from cmcr_hf.modeling.configuration_cmcr import LEAF_MODALITIES
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector
from cmcr_hf.output import write_json
from cmcr_hf.training.aggregate import aggregate
from cmcr_hf.training.pools import pool_stores
from cmcr_hf.training.recipe import Bridge
from cmcr_hf.training.train import ConnectorTrainingArguments, train_connector

from .variants import EDITS, Variant

# To be raised with any change of the package or of these files that makes other connectors of the same settings.
VERSION = 2
EX_MCR_HIDDEN_DIM = 1024


@dataclass(frozen=True)
class Schedule:
    batch_size: int
    steps: int


@dataclass
class Texts:
    """Items of the overlap modality in both spaces, `(rows, dim)` unit rows, and what each is about and its kind."""

    first: torch.Tensor
    second: torch.Tensor
    about: list[str]
    kinds: list[str]
    schedule: Schedule


@dataclass
class Study:
    """What every connector has in common: two spaces, what connects them, their memories, and the test items.

    Args:
        spaces: the base (CLIP) first.
        texts: the sets of overlap items by their title.
        memories: of each space's leaf modality, `(rows, dim)` unit rows.
        items: the leaf of the second space retrieves that of the first.
        distillation: schedule of bridge distillation, whose batches are of the memories, whatever the texts.
    """

    spaces: tuple[str, str]
    overlap: str
    texts: dict[str, Texts]
    memories: tuple[torch.Tensor, torch.Tensor]
    items: RetrievalSet
    distillation: Schedule

    @property
    def leaves(self) -> tuple[str, str]:
        first, second = (LEAF_MODALITIES[space, self.overlap] for space in self.spaces)
        return first, second

    def save(self, folder: Path) -> str:
        """Write everything for the processes that train, and return its sha256."""
        tensors = {f"memory/{place}": rows for place, rows in enumerate(self.memories)}
        for title, texts in self.texts.items():
            tensors |= {f"texts/{title}/0": texts.first, f"texts/{title}/1": texts.second}
        tensors |= {"test/0": self.items.gallery.embeds, "test/1": self.items.query.embeds}
        safetensors.torch.save_file(
            {name: rows.float().contiguous() for name, rows in tensors.items()}, folder / "rows"
        )
        document = {
            "spaces": self.spaces,
            "overlap": self.overlap,
            "texts": {
                title: {"about": texts.about, "kinds": texts.kinds, "schedule": asdict(texts.schedule)}
                for title, texts in self.texts.items()
            },
            "labels": [list(self.items.gallery.labels), list(self.items.query.labels)],
        }
        write_json(folder / "study.json", document)
        write_json(folder / "distillation.json", asdict(self.distillation))
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("rows", "study.json")]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()


# One for each process: it stays while that process trains.
@cache
def _load(folder: Path) -> Study:
    rows = safetensors.torch.load_file(folder / "rows")
    document = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    spaces, overlap = tuple(document["spaces"]), document["overlap"]
    sides = [
        Side(space, LEAF_MODALITIES[space, overlap], rows[f"test/{place}"], document["labels"][place])
        for place, space in enumerate(spaces)
    ]
    texts = {
        title: Texts(
            rows[f"texts/{title}/0"],
            rows[f"texts/{title}/1"],
            found["about"],
            found["kinds"],
            Schedule(**found["schedule"]),
        )
        for title, found in document["texts"].items()
    }
    # No connector needs a bank.
    items = RetrievalSet(sides[1], sides[0], rows["test/1"][:0], rows["test/0"][:0])
    distillation = Schedule(**json.loads((folder / "distillation.json").read_text(encoding="utf-8")))
    return Study(spaces, overlap, texts, (rows["memory/0"], rows["memory/1"]), items, distillation)


@dataclass(frozen=True)
class Run:
    """A connector to train: on which texts, in which way, from which seed."""

    texts: str
    variant: Variant
    seed: int

    def key(self, digest: str, distillation: Schedule, bf16: bool) -> str:
        """Return the name under which what it measured is kept."""
        settings = {**asdict(self.variant), "texts_of": self.texts, "seed": self.seed, "bf16": bf16}
        for shown in ("name", "group", "against", "dear"):
            del settings[shown]
        settings |= {"study": digest, "version": VERSION, "torch": torch.__version__}
        if self.variant.distils:
            settings["distillation"] = asdict(distillation)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def measure(
    study: Study, runs: Sequence[Run], folder: Path, *, workers: int, bf16: bool = False
) -> Iterator[tuple[Run, Metrics]]:
    """Yield what each run measured, in their order, `workers` of them at once in processes of one thread.

    What `folder` has of them is not measured again, and each run is kept there as soon as it is done.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        shared = Path(name)
        digest = study.save(shared)
        paths = [folder / f"{run.key(digest, study.distillation, bf16)}.json" for run in runs]
        arguments = (runs, paths, [shared] * len(runs), [bf16] * len(runs))
        if workers == 1:
            yield from zip(runs, map(_kept, *arguments), strict=True)
            return
        # Models this small cost more to hand to a second thread than to compute.
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            yield from zip(runs, pool.map(_kept, *arguments), strict=True)


def _kept(run: Run, path: Path, folder: Path, bf16: bool) -> Metrics:
    if path.is_file():
        found: Metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return found
    metrics = train_and_measure(run, _load(folder), bf16=bf16)
    write_json(path, {"run": asdict(run), "metrics": metrics})
    return metrics


def train_and_measure(run: Run, study: Study, *, bf16: bool = False) -> Metrics:
    """Train the connector of a run and measure retrieval between the test items, both ways."""
    variant = run.variant
    schedule = study.distillation if variant.distils else study.texts[run.texts].schedule
    projectors: dict[str, dict[str, int]] = {
        space: {"input_dim": memory.shape[1]} for space, memory in zip(study.spaces, study.memories, strict=True)
    }
    if variant.connector.get("objective") == "ex-mcr":
        # Its shared space is the base; within, its projector is as wide as that of C-MCR.
        projectors[study.spaces[1]]["hidden_dim"] = EX_MCR_HIDDEN_DIM
    bridges = [[*study.spaces, study.overlap]]
    config = CMCRConfig(projectors=projectors, bridges=bridges, **variant.connector)
    with tempfile.TemporaryDirectory() as name, tuned_cpu(), _edited(variant):
        args = ConnectorTrainingArguments(
            output_dir=name,
            max_steps=max(1, round(schedule.steps * variant.steps)),
            per_device_train_batch_size=round(schedule.batch_size * variant.batch),
            seed=run.seed,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        connector, _ = train_connector(config, training_rows(run, study), args, log_lines=False)
        return connector_metrics(connector, [study.items])


@contextmanager
def _edited(variant: Variant) -> Iterator[None]:
    """Let connectors that are made have the layers that a variant asks for."""
    if not variant.edit:
        yield
        return

    class Edited(CMCRConnector):
        def __init__(self, config: CMCRConfig) -> None:
            super().__init__(config)
            EDITS[variant.edit](self)

    with patch("cmcr_hf.training.train.CMCRConnector", Edited):
        yield


def training_rows(run: Run, study: Study) -> dict[str, torch.Tensor]:
    """Return what a connector trains on: each text in both spaces and its two pseudo items, row by row."""
    variant, texts = run.variant, study.texts[run.texts]
    rows = torch.arange(len(texts.about))
    if variant.texts:
        rows = torch.tensor([row for row, kind in enumerate(texts.kinds) if kind == variant.texts])
    if variant.share < 1:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[drawn[: max(2, round(variant.share * len(rows)))].sort().values]
    native = [texts.first[rows], texts.second[rows]]
    if variant.distils:
        # The bank, and the items of the memories themselves.
        return dict(zip(_names(study), [*native, *study.memories], strict=True))
    pools = [
        _centred_on(modality, native, study, variant.temperature) for modality in variant.pools or (study.overlap,)
    ]
    parts = {name: torch.cat([pool[name] for pool in pools]) for name in pools[0]}
    if variant.deranged:
        # Both vectors of a text in one space move together: only the pairing of the spaces is broken.
        about = [texts.about[row] for row in rows.tolist()]
        order = derange_by_name(about, torch.Generator().manual_seed(run.seed))
        for name in parts:
            if name.startswith(study.spaces[1]):
                parts[name] = parts[name][order]
    return parts


def _centred_on(
    modality: str, native: Sequence[torch.Tensor], study: Study, temperature: float
) -> dict[str, torch.Tensor]:
    """Return the four embeddings of every item of a modality, of which it has one or two and the others are pseudo."""
    rows = {(space, study.overlap): part for space, part in zip(study.spaces, native, strict=True)}
    rows |= dict(zip(zip(study.spaces, study.leaves, strict=True), study.memories, strict=True))
    aggregated = partial(_pseudo, temperature)
    parts = pool_stores(Bridge(study.spaces[1], study.overlap, ()), modality, rows, aggregated)
    return dict(zip(_names(study), parts, strict=True))


def _names(study: Study) -> list[str]:
    """Return what `train_connector` calls the overlap in both spaces and the leaf of each."""
    names = [f"{space}_{study.overlap}" for space in study.spaces]
    return names + [f"{space}_{leaf}" for space, leaf in zip(study.spaces, study.leaves, strict=True)]


def _pseudo(
    temperature: float, queries: torch.Tensor, memory: torch.Tensor, values: torch.Tensor | None
) -> torch.Tensor:
    if temperature:
        return aggregate(queries, memory, values=values, temperature=temperature, normalize=True)
    nearest = torch.cat([(part @ memory.T).argmax(dim=1) for part in queries.split(1024)])
    return (memory if values is None else values)[nearest]
