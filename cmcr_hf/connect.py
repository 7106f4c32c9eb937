"""Walk a recipe: embed, aggregate, train, save, evaluate. What is there and valid is not made again."""

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
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME

from .conversion.hub import model_card
from .evaluation.connection import Metrics, RetrievalSet, baseline_metrics, check_classes, connector_metrics
from .modeling.configuration_cmcr import CMCRConfig
from .modeling.modeling_cmcr import CMCRConnector, CMCRModel
from .modeling.processing_cmcr import CMCRProcessor
from .training.aggregate import aggregate
from .training.data import Items
from .training.embed import embed, source_record
from .training.recipe import EvaluateSpec, Recipe, TrainSpec
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
        """Return the row-aligned embeddings of the training: `{"{space}_{modality}": (texts, dim)}`."""
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

    Written below `folder`: `stores/` and `pseudo/` (embeddings), `train/` (checkpoints and log), `connector/` (the
    trained part alone), `model/` (everything, for `CMCRModel.from_pretrained`), `evaluation.json`. Run it again to go
    on where it was stopped.

    Args:
        data_root: folder that the recipe's relative paths are relative to.
        batch_size: items embedded at once.
        report: takes a line about each stage.

    Raises:
        ValueError: bad recipe or data, or `folder` holds results of other inputs; names the place and the remedy.
    """
    folder, data_root = Path(folder), Path(data_root)
    # All data and classes first: what is wrong with them should not be found behind hours of work.
    data = {modality: Items(getattr(recipe, modality), modality, data_root) for modality in ("text", "image", "audio")}
    held_back, labels = _held_back(recipe.evaluate, data_root)
    sources = recipe.sources
    report(f"sources: {sources['clip'].id} (CLIP), {sources['clap'].id} (CLAP)")
    model = _load_sources(recipe)
    model.to(device)  # type: ignore[arg-type]
    processor = CMCRProcessor.from_sources_pretrained(
        sources["clip"].id,
        sources["clap"].id,
        revisions={space: source.revision for space, source in sources.items()},
    )

    records = {
        space: source_record(record["id"], record["revision"], model.sources[space])
        for space, record in (model.config.sources or {}).items()
    }

    def embedded(name: str, space: str, items: Items) -> EmbeddingStore:
        with _stage(f"embed {name}", report) as done:
            store = embed(
                model.sources[space],
                processor,
                items,
                folder / "stores" / name,
                space=space,
                record=records[space],
                dim=(model.config.projectors or {})[space]["input_dim"],
                batch_size=batch_size,
            )
            done(f"{store.rows} rows of {store.dim} in {store.folder}")
        return store

    def aggregated(queries: EmbeddingStore, memory: EmbeddingStore) -> EmbeddingStore:
        name = f"{memory.space}-{memory.modality}"
        with _stage(f"aggregate {name}", report) as done:
            store = _aggregate(queries, memory, folder / "pseudo" / name, recipe.aggregate_temperature, device)
            done(f"{store.rows} texts over {memory.rows} {memory.modality} items in {store.folder}")
        return store

    text_clip = embedded("clip-text", "clip", data["text"])
    text_clap = embedded("clap-text", "clap", data["text"])
    image = embedded("clip-image", "clip", data["image"])
    audio = embedded("clap-audio", "clap", data["audio"])
    stores = [text_clip, text_clap, aggregated(text_clip, image), aggregated(text_clap, audio)]
    trained = _train(recipe, model.config, stores, folder / "train", device, report)
    model.connector.load_state_dict(trained.state_dict())

    with _stage("save", report) as done:
        kept = "kept, in " if _save(model, processor, folder) else ""
        done(f"{kept}{folder / 'model'} (everything) and {folder / 'connector'} (projectors alone)")
    items = table = None
    if held_back:
        items = RetrievalSet(
            audio=embedded("evaluate-clap-audio", "clap", held_back["audio"]).tensor(),
            image=embedded("evaluate-clip-image", "clip", held_back["image"]).tensor(),
            audio_labels=labels["audio"],
            image_labels=labels["image"],
            text_clap=text_clap.tensor(),
            text_clip=text_clip.tensor(),
        )
        if "names" in held_back:
            items.names_clap = embedded("evaluate-clap-names", "clap", held_back["names"]).tensor()
            items.names_clip = embedded("evaluate-clip-names", "clip", held_back["names"]).tensor()
        with _stage("evaluate", report) as done:
            table = {**baseline_metrics(items), "C-MCR": connector_metrics(model.connector, items)}
            write_json(folder / "evaluation.json", {"recipe": recipe.name, "metrics": table})
            done(f"{len(items.audio)} clips x {len(items.image)} images in {folder / 'evaluation.json'}")
    card = _card(recipe, model.config, data, table)
    for name in ("model", "connector"):
        _write_text(folder / name / "README.md", card)
    return Connection(recipe, folder, model, items, table)


def _card(recipe: Recipe, config: CMCRConfig, data: dict[str, Items], table: dict[str, Metrics] | None) -> str:
    """Return the text of the model card: sources, data and settings of the recipe, and the table if there is one."""
    roles = {"text": "the texts that connect", "image": "image memory", "audio": "audio memory"}
    entries = [
        {
            "name": spec.dataset or spec.folder or spec.table,
            "role": roles[modality],
            "rows": len(data[modality]) if len(getattr(recipe, modality)) == 1 else spec.limit,
            "licence": spec.licence,
        }
        for modality in roles
        for spec in getattr(recipe, modality)
    ]
    settings = {
        "objective": config.objective,
        "temperatures": {
            "aggregation": recipe.aggregate_temperature,
            "overlap": config.overlap_temperature,
            "leaf": config.leaf_temperature,
        },
        "weight of the gap term": config.intra_weight,
        "noise": {"norm": config.noise_norm},
        **asdict(recipe.train),
    }
    results = [
        {"method": name}
        | {f"{way} {metric}": f"{value:.3f}" for way in metrics for metric, value in metrics[way].items()}
        for name, metrics in (table or {}).items()
    ]
    card = model_card(
        config,
        repo_id=f"cmcr-{recipe.name}",
        licences={space: source.licence for space, source in recipe.sources.items()},
        licence=recipe.licence,
        training_data=entries,
        training=settings,
        results=results,
        evaluation_command=f"cmcr connect {recipe.name}" if results else None,
        synthetic_note="all data, and all that the encoders were trained on." if recipe.world is not None else None,
    )
    return str(card)


def _held_back(spec: EvaluateSpec | None, data_root: Path) -> tuple[dict[str, Items], dict[str, list[str]]]:
    """Read the evaluation items and the classes of both sides; nothing where the recipe does not evaluate."""
    if spec is None:
        return {}, {}
    items = {"image": Items([spec.image], "image", data_root), "audio": Items([spec.audio], "audio", data_root)}
    labels: dict[str, list[str]] = {}
    for modality, part in items.items():
        labels[modality] = []
        for item in part:
            if item.label is None:
                raise ValueError(
                    f"The item {item.key!r} of evaluate.{modality} has no class. Fill its label or drop it."
                )
            labels[modality].append(item.label)
    check_classes(labels["audio"], labels["image"])
    if spec.names is not None:
        items["names"] = Items([spec.names], "text", data_root)
    return items, labels


def _load_sources(recipe: Recipe) -> CMCRModel:
    ids = {space: source.id for space, source in recipe.sources.items()}
    for space, name in ids.items():
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise ValueError(f"There is no folder {name!r} for sources.{space}. Correct the path, or name a Hub id.")
    try:
        model = CMCRModel.from_sources_pretrained(
            **ids,
            config=recipe.connector,
            revisions={space: source.revision for space, source in recipe.sources.items()},
            dtype=torch.float32,
        )
    except StrictDataclassError as error:
        raise ValueError(
            f"The connector of the recipe {recipe.name!r} is not valid: {error.__cause__ or error}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"The weights of a source ({', '.join(ids.values())}) are damaged: {error}.") from error
    for space, modality in (("clip", "text"), ("clip", "image"), ("clap", "text"), ("clap", "audio")):
        if not hasattr(model.sources[space], f"get_{modality}_features"):
            kind = type(model.sources[space]).__name__
            raise ValueError(
                f"The {space} source {ids[space]!r} is a {kind}, which embeds no {modality}. Name another."
            )
    return model


def _aggregate(
    queries: EmbeddingStore, memory: EmbeddingStore, folder: Path, temperature: float, device: str
) -> EmbeddingStore:
    """Give every text a pseudo embedding of the leaf modality (semantic consistency), as a store of its own."""
    inputs = {"queries": queries.digest, "memory": memory.digest, "temperature": temperature}
    store = EmbeddingStore.create(
        folder,
        space=memory.space,
        modality=memory.modality,
        source=memory.source,
        dim=memory.dim,
        data_fingerprint=hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
    )
    if store.complete:
        return store
    rows, keys, shards = queries.tensor(device), queries.keys(), list(memory.shards())
    for start in range(store.rows, len(rows), store.shard_rows):
        block = slice(start, start + store.shard_rows)
        # Unit length, so that the noise turns pseudo and native embeddings by the same angle.
        progress = len(rows) > 10_000
        store.append(
            aggregate(rows[block], shards, temperature=temperature, normalize=True, progress=progress), keys[block]
        )
    store.finish()
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
    digests = {f"{store.space}-{store.modality}": store.digest for store in stores}
    key: dict[str, dict[str, Any]] = {"stores": digests, "train": asdict(spec), "connector": recipe.connector}
    state = folder / STAGE
    with _stage("train", report) as done:
        if state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            differing = [
                f"{part}.{name}"
                for part, values in key.items()
                for name in sorted({*values, *found["key"][part]})
                if found["key"][part].get(name) != values.get(name)
            ]
            if differing:
                raise ValueError(
                    f"{folder} holds a training run with other {', '.join(differing)}. Use another output folder, or "
                    "delete this one."
                )
            if found["complete"]:
                done(f"kept, in {folder}")
                return CMCRConnector.from_pretrained(folder / "connector")
        elif folder.exists() and any(path.name != f".{STAGE}.tmp" for path in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no training run. Use another output folder, or delete this one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(state, {"key": key, "complete": False})
        args = training_arguments(spec, folder, device)
        args.resume_from_checkpoint = _last_checkpoint(folder)
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


def _last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that was written to its end, and remove later ones."""
    while (checkpoint := get_last_checkpoint(str(folder))) is not None:
        try:
            # What Trainer writes last, in place.
            json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return checkpoint
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)
    return None


def _save(model: CMCRModel, processor: CMCRProcessor, folder: Path) -> bool:
    """Write the full model and the connector alone, each under a temporary name first; keep what is up to date."""
    weights = hashlib.sha256()
    for name, tensor in model.connector.state_dict().items():
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    key = {"connector": weights.hexdigest(), "sources": model.config.sources}
    state = folder / "saved.json"
    parts = {"connector": model.connector, "model": model}
    present = all((folder / name / SAFE_WEIGHTS_NAME).is_file() for name in parts)
    if present and state.is_file() and json.loads(state.read_text(encoding="utf-8")) == key:
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
    """Write a JSON file whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
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
