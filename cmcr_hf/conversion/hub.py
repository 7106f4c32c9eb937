"""What goes to the Hub beside the weights: cards, made from the templates `*_CARD.md` here, and results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from ..durable import write_durably
from ..modeling.configuration_cmcr import CMCRConfig
from ..modeling.towers_cmcr import split_source
from ..training.manifest import SHA256
from ..training.places import HUB_DATASETS
from ..training.store import EmbeddingStore

# The record of a conversion, beside the card.
CONVERSION = "conversion.json"
EVAL_RESULTS = ".eval_results/cmcr_hf.yaml"
# Role and class of the models that a connection takes as sources, by the `model_type` of their configuration.
SOURCES = {
    "clip": ("clip", "CLIPModel"),
    "siglip": ("clip", "SiglipModel"),
    "clap": ("clap", "ClapModel"),
    "ulip": ("ulip", "UlipModel"),
}


def model_card(
    config: CMCRConfig,
    *,
    repo_id: str,
    licences: Mapping[str, str | None],
    licence: str | None = None,
    training_data: Sequence[Mapping[str, Any]] = (),
    training: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    evaluation_command: str | None = None,
    synthetic_note: str | None = None,
    conversion: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Render the card of a connected model. What is not given is said to be missing, not left out in silence.

    Args:
        repo_id: name of the model on the Hub, or of its folder.
        licences: licence of each source by space.
        licence: licence of the projectors, one of the Hub's identifiers such as `apache-2.0`.
        training_data: rows of `name`, `role`, `rows`, `licence`, and `dataset`, an id on the Hub, where it has one.
        training: settings by name; those that are `None` are left out.
        results: rows with the same keys, the columns of the table.
        evaluation_command: the command that made the results.
        synthetic_note: what of data, sources or results is synthetic.
        conversion: of projectors that were not trained here, as for [`source_card`].

    Raises:
        ValueError: the licence is no identifier, the conversion lacks a key, or a difference exceeds its bound.
    """
    check_licence(licence)
    sources = []
    for space in config.spaces:
        record = (config.sources or {}).get(space) or {}
        name = public_name(record["id"]) if record.get("id") else "not recorded"
        sources.append(
            {"space": space, "id": name, "revision": record.get("revision"), "licence": licences.get(space)}
        )
    # Neither a folder nor a model by its name in another package, such as open_clip:NAME/TAG.
    ids = [str(source["id"]) for source in sources]
    on_the_hub = [name for name in ids if name.count("/") == 1 and ":" not in name]
    # The pipelines of that name take the model, as the Hub's filters by task tell.
    heads = without_sources(config)
    tasks = ["zero-shot-image-classification"] if "clip" in config.spaces and not heads else []
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=[*dict.fromkeys(["c-mcr", config.objective, "cmcr_hf", *config.spaces, *tasks])],
        base_model=on_the_hub or None,
        datasets=list(dict.fromkeys(row["dataset"] for row in training_data if row.get("dataset"))) or None,
    )
    card: ModelCard = _render(
        "MODEL_CARD.md",
        data,
        repo_id=repo_id,
        objective=config.objective,
        sources=sources,
        training_data=list(training_data),
        training=dict(training or {}),
        results=list(results),
        evaluation_command=evaluation_command,
        synthetic_note=synthetic_note,
        without_sources=heads,
        conversion=conversion and conversion_section(conversion),
    )
    return card


def check_licence(licence: str | None) -> None:
    """Check that the Hub takes a licence into the metadata of a card: an identifier, or `None` for none stated."""
    if licence is not None and not re.fullmatch(r"[a-z0-9.-]+", licence):
        raise ValueError(
            f"Expected a licence of lower-case letters, digits, dots and hyphens, got {licence!r}. Name the licence "
            "as the Hub does, such as apache-2.0."
        )


def is_local(source: Any) -> bool:
    """Return whether a source is known by a folder or file of the user, and not by a name that others have too."""
    if not isinstance(source, str):
        return True
    prefix, path = split_source(source)
    if prefix:
        # A tag of open_clip is no file, which has a suffix.
        return Path(path).suffix != ""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return True
    return path.endswith(".pt")


def public_name(source: str) -> str:
    """Return the name of a source without the folders of the user: they say something of a machine, not of a model."""
    prefix, path = split_source(source)
    return prefix + Path(path).name if is_local(source) else source


def without_sources(config: CMCRConfig) -> bool:
    """Return whether a connector neither holds nor names its sources, as converted heads alone do not."""
    return not config.sources and all(config.source_config(space) is None for space in config.spaces)


def source_card(
    config: PreTrainedConfig, *, repo_id: str, licence: str | None, conversion: Mapping[str, Any]
) -> ModelCard:
    """Render the card of a source, a CLIP, SigLIP, CLAP or ULIP, that was converted from an upstream file.

    Args:
        repo_id: name of the model on the Hub, or of its folder.
        licence: of the upstream weights, one of the Hub's identifiers such as `cc0-1.0`.
        conversion: `kind` and name of the upstream `file`, its `sha256`, the `reference` that the outputs were
            compared with, such as `"open_clip_torch 3.3.0"`, their largest `differences` `{output: float}`, and the
            `bound` that these keep.

    Raises:
        ValueError: the licence is no identifier, the conversion lacks a key, a difference exceeds its bound, or the
            configuration is of another model.
    """
    check_licence(licence)
    if config.model_type not in SOURCES:
        raise ValueError(
            f"Expected the configuration of one of {list(SOURCES)}, got {config.model_type!r}. Write its card by hand."
        )
    role, model_class = SOURCES[config.model_type]
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if role == "clip" else "feature-extraction",
        tags=["cmcr_hf", role],
    )
    towers = {"image": "vision_config", "text": "text_config"} if role == "ulip" else {}
    card: ModelCard = _render(
        "SOURCE_CARD.md",
        data,
        repo_id=repo_id,
        role=role,
        model_class=model_class,
        siglip=config.model_type == "siglip",
        towers=[modality for modality, name in towers.items() if getattr(config, name) is not None],
        licence=licence,
        conversion=conversion_section(conversion),
    )
    return card


def store_card(store: EmbeddingStore, *, repo_id: str, licence: str | None) -> DatasetCard:
    """Render the card of a store of embeddings as a data set of the Hub.

    Args:
        licence: of the embeddings, one of the Hub's identifiers such as `cc-by-4.0`.
    """
    check_licence(licence)
    address = HUB_DATASETS + repo_id
    data = DatasetCardData(
        license=licence,
        tags=["c-mcr", "cmcr_hf", "embeddings", store.space],
        # The viewer shows the keys; it takes no safetensors.
        configs=[{"config_name": "keys", "data_files": "*.keys.parquet"}],
    )
    card: DatasetCard = _render(
        "STORE_CARD.md",
        data,
        repo_id=repo_id,
        quoted=quoted(address),
        address=address,
        space=store.space,
        modality=store.modality.replace("_", " "),
        key=store.modality,
        source={**store.source, "id": public_name(store.source["id"])},
        # Of a folder or file it is the sha256; of the Hub it is a commit.
        local=bool(SHA256.fullmatch(store.source["revision"])),
        rows=store.rows,
        dim=store.dim,
        dtype=store.dtype,
        skipped=store.skipped,
        licence=licence,
    )
    return card


def write_eval_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """Write results on data sets of the Hub beside the card, in the form that the Hub reads, and return the file.

    The Hub shows them on the page of the model and, where the data set's own `eval.yaml` has the task, on its
    leaderboard. Results on other data belong into the table of the card.

    Args:
        folder: of the model.
        results: rows of `dataset`, its id on the Hub, `task`, the id of a task of that data set, `metric` and
            `value`; also `revision` of the data set and `date` (ISO 8601), where they are known.

    Raises:
        ValueError: a row has no value that is a finite number, or names no data set of the Hub.
    """
    entries = []
    for row in results:
        if str(row["dataset"]).count("/") != 1 or Path(row["dataset"]).exists():
            raise ValueError(
                f"Expected a data set of the Hub as OWNER/NAME, got {row['dataset']!r}. Leave its results in the card."
            )
        if not math.isfinite(row["value"]):
            raise ValueError(f"The {row['metric']} on {row['dataset']} is {row['value']}, expected a finite number.")
        entries.append(
            EvalResultEntry(
                dataset_id=row["dataset"],
                task_id=row["task"],
                value=row["value"],
                dataset_revision=row.get("revision"),
                date=row.get("date"),
                notes=row["metric"],
            )
        )
    path = folder / EVAL_RESULTS
    path.parent.mkdir(exist_ok=True)
    write_durably(path, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode())
    return path


def quoted(name: str) -> str:
    """Return a name as a string of Python."""
    return json.dumps(name, ensure_ascii=False)


def _render(template: str, data: ModelCardData | DatasetCardData, *, repo_id: str, **variables: Any) -> Any:
    # A folder may have any name, a heading is one line.
    name = "".join(character if character.isprintable() else " " for character in repo_id).strip()
    variables = {"repo_id": name, "quoted": quoted(name), **variables}
    kind: Any = DatasetCard if isinstance(data, DatasetCardData) else ModelCard
    with as_file(files("cmcr_hf") / "conversion" / template) as path:
        return kind.from_template(data, template_path=str(path), **variables)


def conversion_section(conversion: Mapping[str, Any]) -> str:
    """Return what both cards say of a conversion: of what file, and how near its outputs are to the reference's."""
    keys = {"kind", "file", "sha256", "reference", "differences", "bound"}
    if not isinstance(conversion, Mapping) or set(conversion) != keys or not conversion["differences"]:
        raise ValueError(f"Expected a conversion with the keys {sorted(keys)}, got {list(conversion)}.")
    differences, bound = conversion["differences"], conversion["bound"]
    for name, difference in differences.items():
        # A comparison with NaN is false.
        if not difference <= bound:
            raise ValueError(
                f"The {name} of the converted {conversion['file']} differ from the reference by {difference:.3g}, "
                f"expected at most {bound:.3g}. Correct the conversion."
            )
    table = [f"| {name} | {difference:.3g} |" for name, difference in differences.items()]
    return "\n".join(
        [
            "| upstream | |",
            "|---|---|",
            f"| kind | {conversion['kind']} |",
            f"| file | `{conversion['file']}` |",
            f"| sha256 | `{conversion['sha256']}` |",
            f"| reference | {conversion['reference']} |",
            "",
            f"The same inputs through the reference and through this model differ by at most {bound:.3g}:",
            "",
            "| output | largest difference |",
            "|---|---|",
            *table,
        ]
    )
