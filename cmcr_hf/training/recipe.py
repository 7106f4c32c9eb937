"""Recipes: YAML files that say which spaces to connect, on which data, and how."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Collection
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

# What a data entry may say beside `licence` and `note`, and `limit`, `template` and `stores`, which go with items.
DATA_OPTIONS: dict[str, set[str]] = {
    "folder": {"pattern", "label"},
    "table": {"column", "files", "label", "where"},
    "dataset": {"column", "config", "split", "revision", "data_files", "label", "where"},
    "stores": set(),
}
# The counts of the synthetic world that a recipe may ask for, by the spaces that CLIP is connected with.
WORLD_COUNTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("clap",): ("images", "sounds", "texts", "test_images", "test_sounds"),
    ("ulip",): ("images", "clouds", "texts", "test_images", "test_clouds", "test_texts"),
    ("clap", "ulip"): (
        *("images", "sounds", "clouds", "texts"),
        *("test_images", "test_sounds", "test_clouds", "test_texts"),
    ),
}
# tau_1 of the paper.
AGGREGATE_TEMPERATURE = 0.01
# What a space is connected with CLIP through, where a recipe does not say.
OVERLAPS = {"clap": "text", "ulip": "image"}
MODALITIES = ("text", "image", "audio", "point_cloud")
# The objectives that a field of the connector means something to, of those that do not mean something to all.
OBJECTIVES_OF = {
    **dict.fromkeys(("overlap_temperature", "intra_weight", "intra_squared"), ("c-mcr", "ex-mcr")),
    **dict.fromkeys(
        ("target_power", "target_lift", "mix_items", "posterior_temperatures", "posterior_top"),
        ("bridge-distillation",),
    ),
}
# What no recipe comes near: beyond it, a file is another one or means harm.
MAX_BYTES = 2**20
MAX_VALUES = 10_000


@dataclass
class DataSpec:
    """One body of items of one modality: one of `folder`, `table` and `dataset`, or the stores of its embeddings.

    Args:
        folder: folder of image, audio or point cloud files, read in sorted order; relative to the data root, or an
            address such as `hf://datasets/OWNER/NAME/FOLDER`, whose files are fetched one by one.
        pattern: glob below the folder; all files of the modality's usual formats where it is missing.
        table: .csv, .tsv, .jsonl, .parquet, .txt (a text a line) or .json (a list of strings, or an object whose keys
            are the texts); UTF-8. Quotation marks have a meaning in .csv alone. Relative to the data root, or an
            address such as `s3://BUCKET/captions.csv`.
        column: column or columns of the table or data set that hold the texts or the file names; a table's first where
            it is missing. Empty cells are passed over.
        files: folder that the file names of a table are relative to, or an address, whose files are fetched one by
            one; the table's own where it is missing.
        dataset: Hub data set id or local folder for `datasets.load_dataset`, streamed.
        config, split, revision: of the data set; `train` is the default split.
        data_files: glob of its files, where they are not all wanted; or, behind `dataset: csv` and its like,
            `hf://datasets/OWNER/NAME/GLOB`.
        stores: `{space: folder or address}`: embeddings of the items that `cmcr embed` made, such as
            `{clip: hf://datasets/OWNER/NAME}`, relative to the data root. Where they are of all spaces that the
            modality is embedded in, the items need not be given; else they are embedded in the others.
        label: where an item's class comes from, for evaluation: `parent` (folder name) or `stem` (file name) of a
            folder's files, else a column.
        where: `{column: [values]}`: keep only rows whose column has one of these values.
        limit: take this many items at most, from the start.
        template: text with `{}` that each text is put into, e.g. `"a photo of a {}"`.
        licence, note: for the reader and the model card.
    """

    folder: str | None = None
    pattern: str | None = None
    table: str | None = None
    column: str | list[str] | None = None
    files: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    stores: dict[str, str] | None = None
    label: str | None = None
    where: dict[str, list[str]] | None = None
    limit: int | None = None
    template: str | None = None
    licence: str | None = None
    note: str | None = None

    @property
    def has_items(self) -> bool:
        """Whether the items themselves are named, and not stores alone."""
        return any(name is not None for name in (self.folder, self.table, self.dataset))

    def __post_init__(self) -> None:
        given = [name for name in ("folder", "table", "dataset") if getattr(self, name) is not None]
        if self.stores == {}:
            raise ValueError("expected stores as {space: folder or address}, got an empty mapping.")
        if not given and self.stores is not None:
            given = ["stores"]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of folder, table and dataset, got {', '.join(given) or 'none'}.")
        kind = given[0]
        options = set.union({"limit", "template"} if kind == "stores" else set(), *DATA_OPTIONS.values())
        for name in sorted(options - DATA_OPTIONS[kind]):
            if getattr(self, name) != getattr(type(self), name):
                known = ", ".join(sorted(DATA_OPTIONS[kind])) or "no other key"
                raise ValueError(f"{name} does not go with {kind}, which takes {known}. Remove it.")
        if self.column == []:
            raise ValueError("expected the name of a column, or several, got an empty list.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"expected limit to be at least 1, got {self.limit}.")
        if self.template is not None and self.template.count("{}") != 1:
            raise ValueError(f"expected a template with one {{}} for the text, got {self.template!r}.")


@dataclass
class SourceSpec:
    """A source model: Hub id or folder (relative to the recipe's file), with its licence for the model card."""

    id: str
    revision: str | None = None
    licence: str | None = None


@dataclass
class TrainSpec:
    """How the projectors are trained: the paper's schedule by default (AdamW, cosine decay to zero)."""

    epochs: int = 36
    batch_size: int = 4096
    learning_rate: float = 1e-3
    # The paper does not name a weight decay; BatchNorm makes the loss blind to the scale of most weights.
    weight_decay: float = 0.0
    warmup_steps: int = 0
    seed: int = 0
    # Rows held out of training for the evaluation loss, from a fixed permutation.
    validation_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}.")
        for name in ("weight_decay", "warmup_steps", "seed", "validation_rows"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} to be 0 or more, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}.")


@dataclass
class EvaluateSpec:
    """Held-back items with classes: sounds, point clouds or both, and the images or texts to retrieve them with.

    Args:
        names: a phrase or several for each class: for the closed cascade of sounds, and for the zero-shot
            classification of point clouds. Their label is the class, the phrase itself where it is missing.
    """

    image: DataSpec | None = None
    audio: DataSpec | None = None
    text: DataSpec | None = None
    point_cloud: DataSpec | None = None
    names: DataSpec | None = None

    def __post_init__(self) -> None:
        for name in (*MODALITIES, "names"):
            if (spec := getattr(self, name)) is not None and spec.stores is not None:
                raise ValueError(f"{name} has stores, expected items, which have classes. Name their files or table.")
        for modality in self.modalities:
            if getattr(self, modality).label is None:
                raise ValueError(f"{modality} lacks a label, the class of an item: parent, stem or a column.")

    @property
    def modalities(self) -> list[str]:
        """The modalities of the items that are given."""
        return [modality for modality in MODALITIES if getattr(self, modality) is not None]


@dataclass(frozen=True)
class Bridge:
    """How CLIP is connected with another space.

    Args:
        space: the other one.
        overlap: the modality that both share and that connects them.
        pools: the modalities, of the overlap and the two leaves, that the pools of the training are centred on.
    """

    space: str
    overlap: str
    pools: tuple[str, ...]

    @property
    def spaces(self) -> tuple[str, str]:
        """CLIP and the other space."""
        return ("clip", self.space)

    @property
    def leaves(self) -> dict[str, str]:
        """The modality that is left to each space, for which the overlap gets pseudo embeddings."""
        from ..modeling.configuration_cmcr import LEAF_MODALITIES

        return {space: LEAF_MODALITIES[space, self.overlap] for space in self.spaces}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The overlap and the leaf modalities."""
        return (self.overlap, *self.leaves.values())


@dataclass
class Recipe:
    """A whole connection: of CLIP with CLAP through texts, with ULIP through images, or, by `ex-mcr`, with both.

    Args:
        sources: `clip`, and `clap`, `ulip` or both.
        text, image, audio, point_cloud: data. That of an overlap modality is embedded in both spaces and connects
            them; the leaf modalities are the memories. A connection of two spaces takes three of the four.
        connector: fields of `CMCRConfig`, e.g. `{projection_dim: 256}`. Where it names no objective, two spaces are
            connected by `bridge-distillation`, which real data favours (docs/bridge_distillation.md), and three by
            `ex-mcr`, the only one that can.
        pools: the modalities that the training data is centred on: every item of one is a training row, which gets
            pseudo embeddings of the other three kinds. The overlap alone by default; under `ex-mcr` all, as its paper;
            `bridge-distillation` has none, since it trains on the items of the memories themselves.
        aggregate_temperature: tau_1 of equation 1, of pseudo embeddings; `bridge-distillation` makes none.
        world: counts of the synthetic world that is written for this recipe.
        licence: of the projectors that come of it, one of the Hub's identifiers such as `apache-2.0`.
    """

    name: str
    sources: dict[str, SourceSpec]
    text: list[DataSpec] = field(default_factory=list)
    image: list[DataSpec] = field(default_factory=list)
    audio: list[DataSpec] = field(default_factory=list)
    point_cloud: list[DataSpec] = field(default_factory=list)
    description: str = ""
    connector: dict[str, Any] = field(default_factory=dict)
    pools: list[str] | None = None
    aggregate_temperature: float = AGGREGATE_TEMPERATURE
    train: TrainSpec = field(default_factory=TrainSpec)
    evaluate: EvaluateSpec | None = None
    world: dict[str, int] | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        # It names the output folder and the repository of the card.
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"expected name of letters, digits, '-', '_' and '.', got {self.name!r}.")
        if set(self.sources) not in ({"clip", *others} for others in WORLD_COUNTS):
            raise ValueError(
                "expected the sources clip and clap, clip and ulip, or all three, got "
                f"{', '.join(sorted(self.sources)) or 'none'}."
            )
        if not 0 < self.aggregate_temperature < math.inf:
            raise ValueError(f"expected a positive aggregate_temperature, got {self.aggregate_temperature}.")
        # Not with the module: the import of transformers takes seconds, which a command's help can do without.
        from ..modeling.configuration_cmcr import CMCRConfig

        hints = CMCRConfig.__annotations__
        # A recipe names its sources under `sources`, and their configurations come with them.
        unknown = ("clip_config", "clap_config", "ulip_config", "sources", "fingerprints")
        known = [name for name in hints if name not in unknown]
        # CMCRConfig itself keeps unknown fields in silence, as every configuration of transformers does.
        _check_keys(self.connector, known, "connector")
        self.connector = {
            name: _build(hints[name], value, f"connector.{name}") for name, value in self.connector.items()
        }
        if len(self.others) > 1 and self.objective != "ex-mcr":
            raise ValueError(
                f"expected the objective ex-mcr for three spaces, got {self.objective}, which would train one CLIP "
                "projector for both connections. Set connector.objective, or connect CLIP with each space by itself."
            )
        if self.objective == "bridge-distillation" and self.aggregate_temperature != AGGREGATE_TEMPERATURE:
            raise ValueError(
                f"aggregate_temperature is {self.aggregate_temperature}, expected none for bridge-distillation, which "
                "aggregates nothing. Set connector.posterior_temperatures, or remove it."
            )
        for name, objectives in OBJECTIVES_OF.items():
            if name in self.connector and self.objective not in objectives:
                raise ValueError(
                    f"connector.{name} goes with {' and '.join(objectives)}, not with {self.objective}. Name one of "
                    "them as connector.objective, or remove it."
                )
        self._check_bridges()
        self._check_data()
        _check_keys(self.world or {}, WORLD_COUNTS[tuple(self.others)], "world")

    @property
    def objective(self) -> str:
        """What the projectors are trained for."""
        return str(self.connector.get("objective", "ex-mcr" if len(self.others) > 1 else "bridge-distillation"))

    @property
    def connector_fields(self) -> dict[str, Any]:
        """The fields of `CMCRConfig` that the recipe decides, the objective among them."""
        return {**self.connector, "objective": self.objective}

    @property
    def others(self) -> list[str]:
        """The spaces that CLIP is connected with."""
        return [space for space in OVERLAPS if space in self.sources]

    @property
    def spaces(self) -> list[str]:
        """CLIP and the spaces that it is connected with."""
        return ["clip", *self.others]

    @property
    def bridges(self) -> list[Bridge]:
        """What connects CLIP with each other space."""
        overlaps = OVERLAPS | {bridge[1]: bridge[2] for bridge in self.connector.get("bridges") or []}
        bridges = []
        for space in self.others:
            bridge = Bridge(space, overlaps[space], ())
            default = bridge.modalities if self.objective == "ex-mcr" else (bridge.overlap,)
            pools = default if self.pools is None else self.pools
            bridges.append(replace(bridge, pools=tuple(name for name in bridge.modalities if name in pools)))
        return bridges

    @property
    def modalities(self) -> list[str]:
        """The modalities of the training data: those that connect, then the others."""
        bridges = self.bridges
        overlaps = [bridge.overlap for bridge in bridges]
        return list(dict.fromkeys([*overlaps, *(name for bridge in bridges for name in bridge.leaves.values())]))

    def spaces_of(self, modality: str) -> list[str]:
        """Return the spaces that the training data of a modality is embedded in."""
        pairs = {
            (space, name)
            for bridge in self.bridges
            for space, leaf in bridge.leaves.items()
            for name in (bridge.overlap, leaf)
        }
        return [space for space in self.spaces if (space, modality) in pairs]

    def _check_bridges(self) -> None:
        bridges = self.connector.get("bridges")
        if bridges is not None and not (
            all(_is_bridge(bridge, self.sources) for bridge in bridges)
            and sorted(bridge[1] for bridge in bridges) == sorted(self.others)
        ):
            each = " and one ".join(f"[clip, {space}, MODALITY]" for space in self.others)
            raise ValueError(f"expected connector.bridges as one {each}, got {bridges!r}.")
        if self.objective == "bridge-distillation" and self.pools is not None:
            raise ValueError(
                f"pools are {self.pools}, expected none for bridge-distillation, which pairs no rows. Name c-mcr or "
                "ex-mcr as connector.objective, or remove them."
            )
        for bridge in self.bridges:
            if not bridge.pools:
                raise ValueError(
                    f"pools are {self.pools}, expected one at least of {', '.join(bridge.modalities)} for clip and "
                    f"{bridge.space}."
                )
        strange = [name for name in self.pools or [] if name not in self.modalities]
        if strange:
            raise ValueError(f"pools name {strange[0]!r}, expected some of {', '.join(self.modalities)}.")

    def _check_data(self) -> None:
        needed = self.modalities
        for modality in MODALITIES:
            if modality in needed and not getattr(self, modality):
                raise ValueError(f"expected at least one data entry under {modality}.")
            if modality not in needed and getattr(self, modality):
                ways = " and ".join(f"{bridge.space} through {bridge.overlap}" for bridge in self.bridges)
                raise ValueError(
                    f"got data under {modality}, expected {', '.join(m for m in MODALITIES if m in needed)} alone for "
                    f"clip and {ways}. Remove it."
                )
        for modality in sorted(needed):
            self._check_stores(modality)
        if self.evaluate is not None:
            asked, able = [bridge.leaves[bridge.space] for bridge in self.bridges], ("image", "text")
            given = set(self.evaluate.modalities)
            if not given & set(asked) or len(given) < 2 or not given <= {*asked, *able}:
                both = " or ".join(asked)
                raise ValueError(f"evaluate: expected {both}, and image, text or both, got {sorted(given) or 'none'}.")

    def _check_stores(self, modality: str) -> None:
        specs: list[DataSpec] = getattr(self, modality)
        given = next((spec for spec in specs if spec.stores is not None), None)
        if given is None or given.stores is None:
            return
        if len(specs) > 1:
            raise ValueError(
                f"{modality} has {len(specs)} entries and one of them stores, which hold all items of a modality. "
                "Leave one entry."
            )
        spaces = self.spaces_of(modality)
        for space in given.stores:
            if space not in spaces:
                raise ValueError(
                    f"{modality} has a store of {space!r}, expected of {' and '.join(spaces)}, in which it is "
                    "embedded. Remove it."
                )
        missing = [space for space in spaces if space not in given.stores]
        if missing and not given.has_items:
            raise ValueError(
                f"{modality} has no store of {' and '.join(missing)}, and no items to embed. Name a folder, table or "
                "data set of them, or a store."
            )


def _is_bridge(bridge: Any, sources: Collection[str]) -> bool:
    from ..modeling.configuration_cmcr import LEAF_MODALITIES

    return (
        isinstance(bridge, list)
        and len(bridge) == 3
        and bridge[0] == "clip"
        and bridge[1] in sources
        and all((space, bridge[2]) in LEAF_MODALITIES for space in bridge[:2])
    )


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = files("cmcr_hf") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe: the name of one of the package's, or a path to a YAML file.

    Source ids that name a folder beside the recipe's file become absolute paths.

    Raises:
        ValueError: there is no such recipe, or it is not valid; the message names the file and the key.
    """
    path = Path(name_or_path)
    if not path.suffix and not os.path.isfile(path):
        path = Path(str(files("cmcr_hf") / "recipes" / f"{name_or_path}.yaml"))
        if not os.path.isfile(path):
            names = ", ".join(recipe_names())
            raise ValueError(
                f"There is no recipe {os.fspath(name_or_path)!r}. Use one of the package ({names}) or a path to a "
                "YAML file."
            )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"Cannot read the recipe {path}: {error.strerror}. Check the path.") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"The recipe {path} is larger than {MAX_BYTES} bytes. Check the path.")
    try:
        document = yaml.load(content.decode(), _Loader)
    except RecursionError as error:
        raise ValueError(f"The recipe {path} is nested too deeply.") from error
    # PyYAML raises the latter where a value does not fit its tag, such as a date of a 13th month.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"The recipe {path} is not valid YAML: {error}") from error
    try:
        recipe: Recipe = _build(Recipe, document, "")
    except ValueError as error:
        raise ValueError(f"In the recipe {path}: {error}") from error
    for source in recipe.sources.values():
        folder = path.parent / source.id
        if os.path.isdir(folder):
            source.id = str(folder.resolve())
    return recipe


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key given twice, of which YAML's own keeps the last, and aliases without end."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count_values(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MAX_VALUES} values, aliases written out.")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[int, float]) -> float:
    """Count the values that a node stands for where each alias is written out; without end if it holds itself."""
    if id(node) not in counts:
        counts[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        children = itertools.chain.from_iterable(part if isinstance(part, tuple) else (part,) for part in parts)
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _shown(value: object) -> str:
    """Return a value for the line of an error."""
    try:
        return f"{value!r:.200}"
    except ValueError:
        return "a number of thousands of digits"


def _check_keys(given: dict[str, Any], known: Collection[str], where: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(_shown(key).strip("'"), known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."
            raise ValueError(f"unknown key {_shown(key)}{f' in {where}' if where else ''}. {hint}")


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn parsed YAML into the annotated type, with errors that name the place; the whole recipe's place is empty."""
    place = where or "the recipe"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"expected {place} to fit into 64 bits, got {_shown(value)}.")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        # Two mixed unions there are: str | list[str], and float | int, of which the first takes both.
        lists = [argument for argument in kinds if typing.get_origin(argument) is list]
        return _build(lists[0] if lists and isinstance(value, list) else kinds[0], value, where)
    if is_dataclass(kind):
        if isinstance(value, str) and kind is SourceSpec:
            value = {"id": value}
        if not isinstance(value, dict):
            raise ValueError(f"expected {place} to be a mapping, got {_shown(value)}.")
        known = {entry.name: entry for entry in fields(kind)}
        hints = typing.get_type_hints(kind)
        _check_keys(value, known, where)
        for name, entry in known.items():
            if name not in value and entry.default is MISSING and entry.default_factory is MISSING:
                raise ValueError(f"{place} lacks the key {name!r}.")
        built = {key: _build(hints[key], item, f"{where}.{key}" if where else key) for key, item in value.items()}
        try:
            return kind(**built)  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from error
    if origin in (list, dict):
        if not isinstance(value, origin):
            raise ValueError(
                f"expected {place} to be a {'list' if origin is list else 'mapping'}, got {_shown(value)}."
            )
        if isinstance(value, list):
            return [_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
        return {str(key): _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string.
        with suppress(ValueError):
            return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"expected {place} to be of type {kind.__name__}, got {_shown(value)}.")
    return value
