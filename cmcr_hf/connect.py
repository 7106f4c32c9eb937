"""Walk a recipe: embed, aggregate, train, assemble, evaluate, save. What is there and valid is not made again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from .evaluation.connection import Metrics, RetrievalSet, baseline_metrics, connector_metrics
from .modeling.configuration_cmcr import CMCRConfig
from .modeling.modeling_cmcr import CMCRConnector, CMCRModel
from .modeling.processing_cmcr import CMCRProcessor
from .training.aggregate import aggregate
from .training.data import Items
from .training.embed import embed, source_record
from .training.recipe import DataSpec, Recipe, TrainSpec
from .training.store import EmbeddingStore
from .training.train import ConnectorTrainingArguments, train_connector


STAGE = "stage.json"
# Native pair first, then the pseudo pair: the order in which the training script reports them.
TRAINING_STORES = ("stores/clip-text", "stores/clap-text", "pseudo/clip-image", "pseudo/clap-audio")


@dataclass
class Connection:
    """What `connect` made: the folder, the model in it, and, where the recipe evaluates, the items and the table."""

    recipe: Recipe
    folder: Path
    model: CMCRModel
    items: RetrievalSet | None
    table: dict[str, Metrics] | None

    def training_embeds(self) -> dict[str, torch.Tensor]:
        """Return the row-aligned embeddings that the connector was trained on: `{"{space}_{modality}": (texts, dim)}`."""
        stores = [EmbeddingStore.open(self.folder / name) for name in TRAINING_STORES]
        return {f"{store.space}_{store.modality}": store.tensor() for store in stores}


def connect(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    data_root: str | os.PathLike[str],
    *,
    device: str = "cpu",
    batch_size: int = 32,
    report: Callable[[str], None] = lambda line: None,
) -> Connection:
    """Connect two spaces as a recipe says, in a folder of their own.

    Written below `folder`: `stores/` and `pseudo/` (embeddings), `train/` (checkpoints and log), `connector/` (the trained part
    alone), `model/` (everything, for `CMCRModel.from_pretrained`), `evaluation.json`. Run it again to go on where it was stopped.

    Args:
        data_root: folder that the recipe's relative paths are relative to.
        batch_size: items embedded at once.
        report: takes a line about each stage.

    Raises:
        ValueError: bad recipe or data, or `folder` holds results of other inputs; the message names the place and the remedy.
    """
    folder, data_root = Path(folder), Path(data_root)
    sources = recipe.sources
    report(f"sources: {sources['clip'].id} (CLIP), {sources['clap'].id} (CLAP)")
    torch.manual_seed(recipe.train.seed)
    model = CMCRModel.from_sources_pretrained(
        clip=sources["clip"].id,
        clap=sources["clap"].id,
        config=recipe.connector,
        revisions={space: source.revision for space, source in sources.items()},
        dtype=torch.float32,
    )
    model.to(device)  # type: ignore[arg-type]
    processor = CMCRProcessor.from_sources_pretrained(sources["clip"].id, sources["clap"].id)

    def embedded(name: str, space: str, modality: str, specs: list[DataSpec]) -> EmbeddingStore:
        record = (model.config.sources or {})[space]
        source = model.sources[space]
        with _stage(f"embed {name}", report) as done:
            store = embed(
                source,
                processor,
                Items(specs, modality, data_root),
                folder / "stores" / name,
                space=space,
                record=source_record(record["id"], record["revision"], source),
                batch_size=batch_size,
            )
            done(f"{store.rows} rows of {store.dim} in {store.folder}")
        return store

    text_clip = embedded("clip-text", "clip", "text", recipe.text)
    text_clap = embedded("clap-text", "clap", "text", recipe.text)
    image = embedded("clip-image", "clip", "image", recipe.image)
    audio = embedded("clap-audio", "clap", "audio", recipe.audio)
    pseudo_image = _aggregate(text_clip, image, folder / "pseudo" / "clip-image", recipe.aggregate_temperature, device, report)
    pseudo_audio = _aggregate(text_clap, audio, folder / "pseudo" / "clap-audio", recipe.aggregate_temperature, device, report)
    stores = [text_clip, text_clap, pseudo_image, pseudo_audio]
    trained = _train(recipe, model.config, stores, folder / "train", device, report)
    model.connector.load_state_dict(trained.state_dict())

    items = table = None
    if recipe.evaluate is not None:
        items = _retrieval_set(recipe, data_root, text_clip, text_clap, embedded)
        with _stage("evaluate", report) as done:
            table = {**baseline_metrics(items), "C-MCR": connector_metrics(model.connector, items)}
            write_json(folder / "evaluation.json", {"recipe": recipe.name, "metrics": table})
            done(f"{len(items.audio)} clips x {len(items.image)} images in {folder / 'evaluation.json'}")
    with _stage("save", report) as done:
        kept = _save(model, processor, folder)
        done(f"{'kept, in ' if kept else ''}{folder / 'model'} (everything) and {folder / 'connector'} (projectors alone)")
    return Connection(recipe, folder, model, items, table)


def retrieval_sides(spec_label: str | None, items: Items, where: str) -> list[str]:
    """Return the classes of evaluation items, which must all have one."""
    labels = [item.label for item in items]
    if spec_label is None or None in labels:
        raise ValueError(f"Evaluation items need classes: set label under {where} (parent, stem or a column).")
    return [str(label) for label in labels]


def _retrieval_set(
    recipe: Recipe,
    data_root: Path,
    text_clip: EmbeddingStore,
    text_clap: EmbeddingStore,
    embedded: Callable[[str, str, str, list[DataSpec]], EmbeddingStore],
) -> RetrievalSet:
    spec = recipe.evaluate
    if spec is None:
        raise ValueError(f"The recipe {recipe.name!r} has no evaluate section.")
    audio_labels = retrieval_sides(spec.audio.label, Items([spec.audio], "audio", data_root), "evaluate.audio")
    image_labels = retrieval_sides(spec.image.label, Items([spec.image], "image", data_root), "evaluate.image")
    items = RetrievalSet(
        audio=embedded("evaluate-clap-audio", "clap", "audio", [spec.audio]).tensor(),
        image=embedded("evaluate-clip-image", "clip", "image", [spec.image]).tensor(),
        audio_labels=audio_labels,
        image_labels=image_labels,
        text_clap=text_clap.tensor(),
        text_clip=text_clip.tensor(),
    )
    if spec.names is not None:
        items.names_clap = embedded("evaluate-clap-names", "clap", "text", [spec.names]).tensor()
        items.names_clip = embedded("evaluate-clip-names", "clip", "text", [spec.names]).tensor()
    return items


def _aggregate(
    queries: EmbeddingStore,
    memory: EmbeddingStore,
    folder: Path,
    temperature: float,
    device: str,
    report: Callable[[str], None],
) -> EmbeddingStore:
    """Give every text a pseudo embedding of the leaf modality (semantic consistency), as a store of its own."""
    with _stage(f"aggregate {memory.space}-{memory.modality}", report) as done:
        inputs = {"queries": queries.digest, "memory": memory.digest, "temperature": temperature}
        store = EmbeddingStore.create(
            folder,
            space=memory.space,
            modality=memory.modality,
            source=memory.source,
            dim=memory.dim,
            data_fingerprint=hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        )
        if not store.complete:
            rows = queries.tensor(device)
            keys = queries.keys()
            for start in range(store.rows, len(rows), store.shard_rows):
                block = slice(start, start + store.shard_rows)
                # Unit length, so that the noise turns pseudo and native embeddings by the same angle.
                pseudo = aggregate(
                    rows[block], list(memory.shards()), temperature=temperature, normalize=True, progress=len(rows) > 10_000
                )
                store.append(pseudo, keys[block])
            store.finish()
        done(f"{store.rows} texts over {memory.rows} {memory.modality} items in {store.folder}")
    return store


def _train(
    recipe: Recipe,
    config: CMCRConfig,
    stores: list[EmbeddingStore],
    folder: Path,
    device: str,
    report: Callable[[str], None],
) -> CMCRConnector:
    spec = recipe.train
    key = {"stores": [store.digest for store in stores], "train": asdict(spec), "connector": recipe.connector}
    state = folder / STAGE
    with _stage("train", report) as done:
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            differing = [name for name in key if found.get("key", {}).get(name) != key[name]]
            if differing:
                raise ValueError(
                    f"{folder} holds a training run with other {' and '.join(differing)}. Use another output folder, or delete this one."
                )
            if found["complete"]:
                done(f"kept, in {folder}")
                return CMCRConnector.from_pretrained(folder / "connector")
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no training run. Use another output folder, or delete this one.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(state, {"key": key, "complete": False})
        args = training_arguments(spec, folder, device)
        args.resume_from_checkpoint = get_last_checkpoint(str(folder))
        embeds = {f"{store.space}_{store.modality}": store.tensor() for store in stores}
        connector, history = train_connector(
            config, embeds, args, validation_rows=spec.validation_rows, log_lines=False
        )
        connector.save_pretrained(folder / "connector")
        write_json(folder / "log.json", {"history": history})
        write_json(state, {"key": key, "complete": True})
        terms = next(entry for entry in reversed(history) if "loss_overlap" in entry)
        losses = ", ".join(f"{name} {terms[name]:.3f}" for name in ("loss", "loss_overlap", "loss_leaf", "loss_intra"))
        done(f"{history[-1]['step']} steps, {losses}, in {folder}")
        return connector


def training_arguments(spec: TrainSpec, folder: Path, device: str) -> ConnectorTrainingArguments:
    """Return the arguments of `Trainer` for the `train` section of a recipe."""
    return ConnectorTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=spec.epochs,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=spec.warmup_steps,
        seed=spec.seed,
        use_cpu=device == "cpu",
    )


def _save(model: CMCRModel, processor: CMCRProcessor, folder: Path) -> bool:
    """Write the full model and the connector alone, each under a temporary name first; keep what is up to date."""
    weights = hashlib.sha256()
    for name, tensor in model.connector.state_dict().items():
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    key = {"connector": weights.hexdigest(), "sources": model.config.sources}
    state = folder / "saved.json"
    parts = {"connector": model.connector, "model": model}
    if state.is_file() and json.loads(state.read_text(encoding="utf-8")) == key:
        if all((folder / name / "config.json").is_file() for name in parts):
            return True
    for name, part in parts.items():
        temporary, old = folder / f".{name}.tmp", folder / f".{name}.old"
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if (folder / name).exists():
            (folder / name).rename(old)
        temporary.rename(folder / name)
        shutil.rmtree(old, ignore_errors=True)
    write_json(state, key)
    return False


def write_json(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _stage(name: str, report: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Report a stage with its seconds when it is done."""
    start = time.perf_counter()
    outcome: list[str] = []
    yield outcome.append
    report(f"{name}: {' '.join(outcome)} [{time.perf_counter() - start:.1f} s]")
