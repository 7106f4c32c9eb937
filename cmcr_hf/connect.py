"""Walk a recipe: embed, aggregate, train, save, evaluate. What is there and valid is not made again."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .connection_card import NOUNS, connection_card, data_entries, data_entry, shown_name
from .durable import locked, named_write_errors, temporary_path, verify_checksums, write_checksums
from .evaluation.classification import class_embeds
from .evaluation.connection import (
    ROWS,
    Differences,
    Metrics,
    RetrievalSet,
    Side,
    baseline_values,
    check_classes,
    connector_values,
    differences,
    metrics_table,
)
from .modeling.configuration_cmcr import CMCRConfig
from .modeling.modeling_cmcr import CMCRConnector, CMCRModel
from .modeling.processing_cmcr import CMCRProcessor
from .output import (
    STAGE,
    check_output,
    damaged,
    remove_evaluation,
    save,
    write_cards,
    write_json,
)
from .pages.page import remove_page
from .pages.report import write_report
from .training.aggregate_stores import aggregate_stores
from .training.data import Item, Items
from .training.embed import embed, source_record
from .training.places import is_address
from .training.pools import pool_stores
from .training.posterior_files import remove_posteriors
from .training.recipe import Bridge, Recipe, TrainSpec, load_recipe, recipe_names
from .training.store import EmbeddingStore, check_made_by, check_same_keys
from .training.train import POSTERIORS, ConnectorTrainingArguments, Embeds, last_checkpoint, train_connector

_RUN = re.compile("_runtime$|_per_second$")
REPORT = "report.html"


@dataclass
class Connection:
    """What `connect` made: the folder, the model in it, and, where the recipe evaluates, the items and the table.

    Args:
        sets: what was measured, the retrieval that the page shows first; empty where the recipe does not evaluate.
        differences: of what needs no training from the connection in the table (see `differences`), for the page.
        media: behind the rows of the sets, by modality; the value of what is neither a file nor a text is None.
        data: the recipe's training data, as rows of `name`, `role`, `rows`, `licence`.
        pools: of each bridge, by the space it connects CLIP with, the row-aligned stores of its training by the
            modality that they are centred on.
    """

    recipe: Recipe
    folder: Path
    model: CMCRModel
    sets: list[RetrievalSet]
    media: dict[str, list[Item]]
    table: dict[str, Metrics] | None
    differences: Differences
    data: list[dict[str, Any]]
    pools: dict[str, dict[str, list[EmbeddingStore]]]

    def training_embeds(self, space: str) -> dict[str, Embeds]:
        """Return what connects CLIP with a space: `{pool: {"{space}_{modality}": (rows, dim)}}`."""
        return {name: training_embeds(stores) for name, stores in self.pools[space].items()}

    def write_report(
        self, table: dict[str, Metrics], spread: dict[str, Metrics] | None = None, command: str | None = None
    ) -> Path:
        """Write the page `report.html` (see `cmcr_hf.report.write_report`) of a table that has a row `C-MCR`.

        Raises:
            ValueError: the recipe does not evaluate.
        """
        spec = self.recipe.evaluate
        if not self.sets or spec is None:
            raise ValueError("The connection was not evaluated: give its recipe an evaluate section.")
        tests = [
            data_entry(getattr(spec, modality), f"{NOUNS[modality]} to test with", len(self.media[modality]))
            for modality in spec.modalities
        ]
        if spec.names is not None:
            tests.append(data_entry(spec.names, "names of the classes", None))
        path = self.folder / REPORT
        histories = {}
        for bridge in self.recipe.bridges:
            log = train_folder(self.recipe, self.folder, bridge) / "log.json"
            if log.is_file():
                histories[bridge.space] = json.loads(log.read_text(encoding="utf-8"))["history"]
        write_report(
            path,
            self.recipe,
            self.model.connector,
            self.sets,
            self.media,
            table,
            spread=spread,
            differences=self.differences,
            data=[*self.data, *tests],
            histories=histories,
            command=command,
        )
        return path


def training_embeds(stores: Sequence[EmbeddingStore]) -> Embeds:
    """Return the embeddings of a pool as the training takes them."""
    return {f"{store.space}_{store.modality}": store.tensor() for store in stores}


def train_folder(recipe: Recipe, folder: Path, bridge: Bridge) -> Path:
    """Return the folder of a bridge's training, one of its own where there are several."""
    return folder / "train" if len(recipe.bridges) == 1 else folder / "train" / bridge.space


def connect(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    data_root: str | os.PathLike[str],
    *,
    device: str = "cpu",
    batch_size: int = 32,
    report: Callable[[str], None] = lambda line: None,
    command: str | None = None,
) -> Connection:
    """Connect spaces as a recipe says, in a folder of their own.

    Written below `folder`: `stores/` and `pseudo/` (embeddings), `train/` (checkpoints and log, by space where several
    are connected with CLIP, one independent of the other), `connector/` (the
    trained part alone), `model/` (everything, for `CMCRModel.from_pretrained`), and, where the recipe evaluates,
    `evaluation.json` and the page `report.html`. Run it again to go on where it was stopped. One run at a time may use
    the folder.

    Args:
        data_root: folder that the recipe's relative paths are relative to.
        batch_size: items embedded at once.
        report: takes a line about each stage.
        command: what the model card and the page name as the way to make the results; `cmcr connect NAME` for a recipe
            of the package.

    Raises:
        ValueError: bad recipe or data, or `folder` holds results of other inputs or files of somebody else, cannot be
            written or is in use; names the place and the remedy.
    """
    folder, data_root = Path(folder), Path(data_root)
    check_output(folder, recipe)
    # All data and classes first: what is wrong with them should not be found behind hours of work.
    bridges, spaces = recipe.bridges, recipe.spaces
    specs = {modality: getattr(recipe, modality) for modality in recipe.modalities}
    data = {
        modality: Items(entries, modality, data_root)
        for modality, entries in specs.items()
        if all(spec.has_items for spec in entries)
    }
    given = _open_stores(recipe, data_root)
    _check_rows(given, data)
    held_back, media = _held_back(recipe, data_root)
    for bridge in bridges:
        _check_training(recipe, bridge, {name: _row_count(name, data, given) for name in _counted(recipe, bridge)})
    sources = recipe.sources
    report("sources: " + ", ".join(f"{sources[space].id} ({space.upper()})" for space in spaces))
    model = _load_sources(recipe)
    model.to(device)  # type: ignore[arg-type]
    processor = CMCRProcessor.from_sources_pretrained(
        **{space: sources[space].id for space in spaces},
        revisions={space: source.revision for space, source in sources.items()},
    )
    for bridge in bridges:
        for space in bridge.spaces:
            if bridge.overlap not in model.config.modalities_of(space):
                raise ValueError(
                    f"The {space} source {sources[space].id!r} has no {bridge.overlap} tower, which is to connect it. "
                    "Name a source that has one."
                )

    records = {
        space: source_record(record["id"], record["revision"], model.sources[space])
        for space, record in (model.config.sources or {}).items()
    }
    dims = {space: projector["input_dim"] for space, projector in (model.config.projectors or {}).items()}
    for (space, _), store in given.items():
        _check_store(store, sources[space].id, records[space], dims[space])

    native: dict[tuple[str, str], EmbeddingStore] = {}
    pseudo: dict[str, EmbeddingStore] = {}

    def trained_on(space: str, modality: str) -> EmbeddingStore:
        if (space, modality) not in native:
            store = given.get((space, modality))
            if store is None:
                store = embedded(space, data[modality])
            else:
                report(f"{space}-{modality}: given, {store.rows} rows of {store.dim} in {store.folder}")
            native[space, modality] = store
            rows = {name: store.rows for (_, name), store in native.items()}
            for bridge in bridges:
                # A streamed data set tells its number of items only now.
                counted = _counted(recipe, bridge)
                if set(counted) <= set(rows):
                    _check_training(recipe, bridge, {name: rows[name] for name in counted})
        return native[space, modality]

    def embedded(space: str, items: Items, prefix: str = "", role: str | None = None) -> EmbeddingStore:
        name = f"{prefix}{space}-{role or items.modality}"
        with _stage(f"embed {name}", report) as done:
            store = embed(
                model.sources[space],
                processor,
                items,
                folder / "stores" / name,
                space=space,
                record=records[space],
                dim=dims[space],
                batch_size=batch_size,
            )
            done(f"{store.rows} rows of {store.dim} in {store.folder}")
        return store

    def aggregated(
        pool: str, queries: EmbeddingStore, memory: EmbeddingStore, values: EmbeddingStore | None
    ) -> EmbeddingStore:
        leaf = memory if values is None else values
        name = f"{leaf.space}-{leaf.modality}"
        # Folders of the time before there were other pools.
        if len(bridges) > 1 or pool != bridges[0].overlap:
            name = f"{pool}/{name}"
        if name not in pseudo:
            with _stage(f"aggregate {name}", report) as done:
                pseudo[name] = store = aggregate_stores(
                    queries,
                    memory,
                    folder / "pseudo" / name,
                    values=values,
                    temperature=recipe.aggregate_temperature,
                    device=device,
                )
                done(f"{store.rows} {NOUNS[pool]} over {memory.rows} {NOUNS[memory.modality]} in {store.folder}")
        return pseudo[name]

    with locked(folder), named_write_errors(folder):
        for bridge in bridges:
            # What can be known to differ before hours of work.
            _check_stage(train_folder(recipe, folder, bridge), _training_key(recipe))
        pools: dict[str, dict[str, list[EmbeddingStore]]] = {}
        for bridge in bridges:
            banks = [trained_on(space, bridge.overlap) for space in bridge.spaces]
            if sum((space, bridge.overlap) in given for space in bridge.spaces) == 1:
                # Known of streamed items only now; two stores were compared before any work.
                check_same_keys(*((str(store.folder), store.keys()) for store in banks))
            for space, modality in bridge.leaves.items():
                trained_on(space, modality)
            if recipe.objective == "bridge-distillation":
                # The items of the memories themselves, for which no pseudo embeddings are needed.
                leaves = [native[leaf] for leaf in bridge.leaves.items()]
                pools[bridge.space] = {bridge.overlap: [*banks, *leaves]}
                continue
            pools[bridge.space] = {
                pool: pool_stores(bridge, pool, native, partial(aggregated, pool)) for pool in bridge.pools
            }
        for bridge in bridges:
            trained = _train(recipe, bridge, model.config, pools[bridge.space], folder, device, report)
            for space in bridge.spaces:
                model.connector.projectors[space].load_state_dict(trained.projectors[space].state_dict())
            if recipe.objective == "bridge-distillation":
                model.config.posterior_temperatures = trained.config.posterior_temperatures
        model.record_fingerprints(processor)

        with _stage("save", report) as done:
            kept = "kept, in " if save(model, processor, folder) else ""
            done(f"{kept}{folder / 'model'} (everything) and {folder / 'connector'} (projectors alone)")
        sets: list[RetrievalSet] = []
        table, apart = None, {}
        if not held_back:
            remove_evaluation(folder / "evaluation.json")
            remove_page(folder / REPORT)
        else:
            sides = {}
            for space, modality in _evaluated(recipe):
                rows = embedded(space, held_back[modality], "evaluate-").tensor()
                sides[modality] = Side(space, modality, rows, [str(item.label) for item in media[modality]])
            names = {
                space: embedded(space, held_back["names"], "evaluate-", "names").tensor()
                for space in spaces
                if "names" in held_back and "text" in model.config.modalities_of(space)
            }
            sets = _retrieval_sets(bridges, native, sides, names, held_back.get("names"))
            with _stage("evaluate", report) as done:
                baselines, own = baseline_values(sets), connector_values(model.connector, sets)
                table = metrics_table(sets, {**baselines, ROWS[recipe.objective]: own})
                apart = differences(baselines, own)
                write_json(folder / "evaluation.json", {"recipe": recipe.name, "metrics": table})
                counts = [f"{len(items)} {NOUNS[modality]}" for modality, items in media.items()]
                done(f"{' x '.join(counts)} in {folder / 'evaluation.json'}")
        command = command or _command(recipe)
        entries = data_entries(recipe, data, given, data_root)
        write_cards(folder, connection_card(recipe, model.config, entries, table, command), report)
        connection = Connection(recipe, folder, model, sets, media, table, apart, entries, pools)
        if table is not None:
            with _stage("report", report) as done:
                done(str(connection.write_report(table, command=command)))
    return connection


def _evaluated(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the space and modality of what is held back: the leaves that CLIP is connected with, then its own."""
    pairs = [(bridge.space, bridge.leaves[bridge.space]) for bridge in recipe.bridges]
    pairs += [("clip", "image"), ("clip", "text")]
    return [
        (space, modality) for space, modality in pairs if recipe.evaluate and modality in recipe.evaluate.modalities
    ]


def _retrieval_sets(
    bridges: Sequence[Bridge],
    native: Mapping[tuple[str, str], EmbeddingStore],
    sides: Mapping[str, Side],
    names: Mapping[str, torch.Tensor],
    named: Items | None,
) -> list[RetrievalSet]:
    """Return what is to be measured: leaves with each other, each with CLIP's modalities, and clouds with their names.

    Args:
        sides: the held-back items by modality.
        names: embeddings of all class names, by those spaces that embed text; `named` are the names.
    """
    classes = [_class(item) for item in named or ()]
    distinct = sorted(set(classes))
    phrases = {space: class_embeds(rows, [distinct.index(name) for name in classes]) for space, rows in names.items()}

    measured = [bridge for bridge in bridges if bridge.leaves[bridge.space] in sides]
    queries = {bridge.space: sides[bridge.leaves[bridge.space]] for bridge in measured}
    banks = {
        bridge.space: [native[space, bridge.overlap].tensor() for space in (bridge.space, "clip")]
        for bridge in measured
    }
    sets = []
    for first, second in itertools.combinations(queries, 2):
        between = (banks[first][1], banks[second][1])
        there, back = banks[first][0], banks[second][0]
        sets.append(RetrievalSet(queries[first], queries[second], there, back, between=between))
    for space, query in queries.items():
        galleries = [sides[modality] for modality in ("image", "text") if modality in sides]
        there, back = banks[space]
        sets += [RetrievalSet(query, gallery, there, back) for gallery in galleries]
        if query.modality == "point_cloud" and phrases:
            sets.append(
                RetrievalSet(query, Side("clip", "text", phrases["clip"], distinct), there, back, classify=True)
            )
    for part in sets:
        if part.query.space in phrases:
            part.query_names, part.gallery_names = phrases[part.query.space], phrases["clip"]
    return sets


def _class(name: Item) -> str:
    """Return the class that a name is of, itself where it has no label."""
    return str(name.label or name.value)


def _counted(recipe: Recipe, bridge: Bridge) -> tuple[str, ...]:
    """Return the modalities whose items are the training rows."""
    return tuple(bridge.leaves.values()) if recipe.objective == "bridge-distillation" else bridge.pools


def _check_training(recipe: Recipe, bridge: Bridge, rows: Mapping[str, int]) -> None:
    """Check what would stop the training behind all embedding.

    Args:
        rows: the items of the modalities that are counted; 0 is a number that is not known yet.
    """
    spec, objective = recipe.train, recipe.objective
    if objective not in ROWS:
        raise ValueError(f"connector.objective is {objective!r}, expected {' or '.join(map(repr, ROWS))}. Correct it.")
    if spec.seed >= 2**32:
        raise ValueError(f"train.seed is {spec.seed}, expected less than 2 ** 32. Lower it in the recipe.")
    if spec.batch_size < 2:
        raise ValueError(
            f"train.batch_size is {spec.batch_size}, expected at least 2: the loss compares the rows of a batch. "
            "Raise it in the recipe."
        )
    total, nouns = sum(rows.values()), " and ".join(NOUNS[name] for name in rows)
    if objective == "bridge-distillation":
        # An epoch is as long as the larger memory.
        total, nouns = max(rows.values()), " or ".join(NOUNS[name] for name in rows)
        if spec.validation_rows:
            raise ValueError(
                f"train.validation_rows is {spec.validation_rows}, expected 0 for bridge-distillation: no item of a "
                "memory has a partner to be found. Remove it."
            )
    if all(rows.values()) and spec.batch_size > total - spec.validation_rows:
        raise ValueError(
            f"train.batch_size is {spec.batch_size}, expected at most the {max(total - spec.validation_rows, 0)} "
            f"training rows ({total} {nouns} less {spec.validation_rows} of train.validation_rows). Lower either in "
            f"the recipe, or add {nouns}."
        )


def _command(recipe: Recipe) -> str | None:
    """Return the command that runs a recipe of the package, None of another or a changed one."""
    ours = recipe.name in recipe_names() and load_recipe(recipe.name) == recipe
    return f"cmcr connect {recipe.name}" if ours else None


def _open_stores(recipe: Recipe, data_root: Path) -> dict[tuple[str, str], EmbeddingStore]:
    """Open the stores that a recipe names, by space and modality, and check what they say of themselves."""
    given = {}
    for modality in recipe.modalities:
        for space, name in (getattr(recipe, modality)[0].stores or {}).items():
            store = EmbeddingStore.open(name if is_address(name) else data_root / name)
            if (store.space, store.modality) != (space, modality):
                raise ValueError(
                    f"The store {name} holds {store.modality} in the space of {store.space}, expected {modality} in "
                    f"that of {space}. Correct {modality}[0].stores in the recipe."
                )
            given[space, modality] = store
    return given


def _row_count(modality: str, data: dict[str, Items], given: dict[tuple[str, str], EmbeddingStore]) -> int:
    """Return the number of items of a modality, 0 where it is not known yet."""
    stores = [store for (_, found), store in given.items() if found == modality]
    return stores[0].rows if stores else len(data[modality])


def _check_rows(given: dict[tuple[str, str], EmbeddingStore], data: dict[str, Items]) -> None:
    """Check that the stores of a modality, and its items where they are listed, are of the same items in order."""
    first: dict[str, EmbeddingStore] = {}
    for (_, modality), store in given.items():
        items = data.get(modality)
        if modality in first:
            check_same_keys(*((str(part.folder), part.keys()) for part in (first[modality], store)))
        elif items is not None and len(items):
            check_same_keys((str(store.folder), store.keys()), ("the items", [item.key for item in items]))
        first.setdefault(modality, store)


def _check_store(store: EmbeddingStore, identity: str, record: dict[str, str], dim: int) -> None:
    remedy = f"Name {store.source['id']!r} at revision {store.source['revision']} as source, or make the store anew."
    check_made_by(store, shown_name(identity), record, dim, remedy)


def _held_back(recipe: Recipe, data_root: Path) -> tuple[dict[str, Items], dict[str, list[Item]]]:
    """Read the evaluation items and list them with their classes; nothing where the recipe does not evaluate."""
    spec = recipe.evaluate
    if spec is None:
        return {}, {}
    items = {modality: Items([getattr(spec, modality)], modality, data_root) for modality in spec.modalities}
    media: dict[str, list[Item]] = {}
    for modality, part in items.items():
        media[modality] = []
        for item in part:
            if item.label is None:
                raise ValueError(
                    f"The item {item.key!r} of evaluate.{modality} has no class. Fill its label or drop it."
                )
            # Of what is streamed, the names alone, whatever its size; texts are short.
            kept = isinstance(item.value, Path | str)
            media[modality].append(item if kept else replace(item, value=None))
    labels = {modality: [str(item.label) for item in part] for modality, part in media.items()}
    leaf, *others = (modality for _, modality in _evaluated(recipe))
    for modality in others:
        check_classes(labels[leaf], labels[modality], (leaf, modality))
    if spec.names is not None:
        items["names"] = Items([spec.names], "text", data_root)
        if "point_cloud" in labels:
            names = [_class(item) for item in items["names"]]
            check_classes(labels["point_cloud"], names, ("point_cloud", "names"))
    return items, media


def _load_sources(recipe: Recipe) -> CMCRModel:
    ids = {space: source.id for space, source in recipe.sources.items()}
    for space, name in ids.items():
        if name.startswith((".", "/")) and not Path(name).is_dir():
            raise ValueError(f"There is no folder {name!r} for sources.{space}. Correct the path, or name a Hub id.")
    try:
        return CMCRModel.from_sources_pretrained(
            **ids,
            config=recipe.connector_fields,
            revisions={space: source.revision for space, source in recipe.sources.items()},
            dtype=torch.float32,
        )
    except StrictDataclassError as error:
        raise ValueError(
            f"The connector of the recipe {recipe.name!r} is not valid: {error.__cause__ or error}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"The weights of a source ({', '.join(ids.values())}) are damaged: {error}.") from error


def _train(
    recipe: Recipe,
    bridge: Bridge,
    config: CMCRConfig,
    pools: Mapping[str, Sequence[EmbeddingStore]],
    folder: Path,
    device: str,
    report: Callable[[str], None],
) -> CMCRConnector:
    spec, folder = recipe.train, train_folder(recipe, folder, bridge)
    digests: dict[str, str] = {}
    for pool, stores in pools.items():
        # As it was before there were other pools.
        prefix = "" if bridge.pools == (bridge.overlap,) else f"{pool}/"
        digests |= {f"{prefix}{store.space}-{store.modality}": store.digest for store in stores}
    key = {**_training_key(recipe), "stores": digests}
    state = folder / STAGE
    with _stage("train" if len(recipe.bridges) == 1 else f"train {bridge.space}", report) as done:
        if state.is_file():
            if _check_stage(folder, key):
                try:
                    verify_checksums(folder / "connector")
                except ValueError as error:
                    raise damaged(folder / "connector", error, f"Delete the folder {folder}") from error
                connector = CMCRConnector.from_pretrained(folder / "connector")
                done(f"kept, in {folder}")
                return connector
        elif folder.exists() and any(path != temporary_path(state) for path in folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no training run. Use another output folder, or delete this one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(state, {"key": key, "complete": False})
        args = training_arguments(spec, folder, device)
        args.resume_from_checkpoint = last_checkpoint(folder)
        embeds = [training_embeds(stores) for stores in pools.values()]
        # Trainer writes into the configuration it is given, so a run that is kept would save another one.
        connector, history = train_connector(
            bridge_config(config, bridge), embeds, args, validation_rows=spec.validation_rows, log_lines=False
        )
        shutil.rmtree(folder / "connector", ignore_errors=True)
        connector.save_pretrained(folder / "connector")
        write_checksums(folder / "connector")
        # Without what tells of the run: its seconds, and means that count from its last interruption.
        log = [{name: value for name, value in entry.items() if not _RUN.search(name)} for entry in history]
        write_json(folder / "log.json", {"history": [entry for entry in log if {"loss", "eval_loss"} & entry.keys()]})
        write_json(state, {"key": key, "complete": True})
        remove_posteriors(folder / POSTERIORS)
        terms = next(entry for entry in reversed(history) if "loss" in entry)
        losses = ", ".join(f"{name} {value:.3f}" for name, value in terms.items() if name.startswith("loss"))
        done(f"{history[-1]['step']} steps, {losses}, in {folder}")
        return connector


def _training_key(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return what a recipe says of the training, by which a run that has begun is known."""
    fields = recipe.connector_fields
    if recipe.objective == "bridge-distillation":
        # Also where the recipe leaves it to the default, which was another before there was the field.
        fields = {"target_lift": CMCRConfig.target_lift, **fields}
    return {"connector": fields, "train": asdict(recipe.train)}


def _check_stage(folder: Path, key: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a folder holds a training run that is complete.

    Raises:
        ValueError: the run that it holds has begun with another key, or its record is damaged.
    """
    state = folder / STAGE
    if not state.is_file():
        return False
    try:
        document = json.loads(state.read_text(encoding="utf-8"))
        found, complete = {part: dict(document["key"][part]) for part in key}, document["complete"] is True
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(state, error, f"Delete the folder {folder}") from error
    # Of the time when there was no other.
    found["connector"].setdefault("objective", "c-mcr")
    if found["connector"]["objective"] == "bridge-distillation":
        found["connector"].setdefault("target_lift", 0)
    differing = [
        f"{part}.{name}"
        for part, values in key.items()
        for name in sorted({*values, *found[part]})
        if found[part].get(name) != values.get(name)
    ]
    # A run that ended before its first checkpoint has nothing to lose to a corrected recipe.
    begun = complete or any(path not in (state, temporary_path(state)) for path in folder.iterdir())
    if differing and begun:
        raise ValueError(
            f"{folder} holds a training run with other {', '.join(differing)}. Use another output folder, or delete "
            "this one."
        )
    return complete


def bridge_config(config: CMCRConfig, bridge: Bridge) -> CMCRConfig:
    """Return the configuration of the connector of one bridge of a model, which trains by itself."""
    if list(bridge.spaces) == config.spaces:
        return deepcopy(config)
    fields = {name: deepcopy(getattr(config, name)) for name in CMCRConfig.__annotations__}
    for space in set(config.spaces) - set(bridge.spaces):
        fields[f"{space}_config"] = None
    fields["projectors"] = {space: fields["projectors"][space] for space in bridge.spaces}
    fields["sources"] = {space: fields["sources"][space] for space in bridge.spaces}
    fields["bridges"] = [[*bridge.spaces, bridge.overlap]]
    return CMCRConfig(**{**fields, "default_spaces": None, "fingerprints": None})


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


@contextmanager
def _stage(name: str, report: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Report a stage with its seconds when it is done."""
    start = time.perf_counter()
    outcome: list[str] = []
    yield outcome.append
    report(f"{name}: {' '.join(outcome)} [{time.perf_counter() - start:.1f} s]")
