"""The model card of a connection: its sources, its data and their licences, its settings and its table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .conversion.hub import model_card
from .evaluation.connection import Metrics
from .modeling.configuration_cmcr import CMCRConfig
from .training.data import Items
from .training.places import HUB_ADDRESS
from .training.recipe import DataSpec, Recipe
from .training.store import EmbeddingStore

NOUNS = {"text": "texts", "image": "images", "audio": "clips", "point_cloud": "point clouds"}


def data_entries(
    recipe: Recipe, data: dict[str, Items], given: dict[tuple[str, str], EmbeddingStore], data_root: Path
) -> list[dict[str, Any]]:
    """Describe the training data of a recipe for a reader, entry by entry, and store by store."""
    overlaps = {bridge.overlap for bridge in recipe.bridges}
    roles = {
        modality: f"the {NOUNS[modality]} that connect"
        if modality in overlaps
        else f"{modality.replace('_', ' ')} memory"
        for modality in recipe.modalities
    }
    entries = []
    for modality, role in roles.items():
        specs = getattr(recipe, modality)
        for spec in specs:
            if spec.has_items:
                entry = data_entry(spec, role, len(data[modality]) if len(specs) == 1 else spec.limit)
                entries.append({**entry, "dataset": _hub_data_set(spec, data_root)})
            for space, name in (spec.stores or {}).items():
                entry = {"name": shown_name(name), "role": f"{role}, embedded by the {space.upper()} source"}
                entry |= {"rows": given[space, modality].rows, "licence": spec.licence}
                entries.append({**entry, "dataset": _data_set_of(name)})
    return entries


def data_entry(spec: DataSpec, role: str, rows: int | None) -> dict[str, Any]:
    name = shown_name(spec.dataset or spec.folder or spec.table or "")
    return {"name": name, "role": role, "rows": rows, "licence": spec.licence}


def _hub_data_set(spec: DataSpec, data_root: Path) -> str | None:
    """Return the id of the data set of the Hub that a data entry reads, None where it reads files of the user."""
    for address in (spec.data_files, spec.folder, spec.table, spec.files):
        if address and (found := _data_set_of(address)):
            return found
    name = spec.dataset or ""
    return name if name.count("/") == 1 and not (data_root / name).is_dir() else None


def _data_set_of(address: str) -> str | None:
    """Return the id of the data set of the Hub that an address lies in, None where it lies elsewhere."""
    found = HUB_ADDRESS.fullmatch(address)
    return found and found[1]


def connection_card(
    recipe: Recipe,
    config: CMCRConfig,
    entries: list[dict[str, Any]],
    table: dict[str, Metrics] | None,
    command: str | None,
) -> str:
    """Return the text of the model card: sources, data and settings of the recipe, and the table if there is one."""
    settings: dict[str, Any] = {"objective": config.objective}
    chosen = config.posterior_temperatures or {}
    if config.objective == "bridge-distillation":
        settings |= {
            "temperature of the cosines": config.leaf_temperature,
            # In the order of the spaces: JSON has another.
            "temperatures of the posteriors": {
                space: f"{chosen[space]:.4g}" for space in config.spaces if space in chosen
            },
            "power of the targets": config.target_power,
            "their lift": config.target_lift,
            "items mixed": config.mix_items,
        }
    else:
        settings |= {
            "temperatures": {
                "aggregation": recipe.aggregate_temperature,
                "overlap": config.overlap_temperature,
                "leaf": config.leaf_temperature,
            },
            "weight of the gap term": config.intra_weight,
            "pools": ", ".join(dict.fromkeys(name for bridge in recipe.bridges for name in bridge.pools)),
        }
    settings |= {"noise": {"norm": config.noise_norm}, **asdict(recipe.train)}
    columns = [(way, metric) for way, metrics in table["chance"].items() for metric in metrics] if table else []
    if len(recipe.bridges) > 1:
        # All of them would be wider than a page.
        columns = [(way, metric) for way, metric in columns if metric in ("mAP", "top-1")]
    results = [
        {"method": name}
        | {
            f"{way} {metric}": f"{metrics[way][metric]:.3f}" if way in metrics else "not measured"
            for way, metric in columns
        }
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
        evaluation_command=command if results else None,
        synthetic_note="all data, and all that the encoders were trained on." if recipe.world is not None else None,
    )
    return str(card)


def shown_name(name: str) -> str:
    """Return the name of a data entry without what a path tells of a machine."""
    path = Path(name)
    return path.name if path.is_absolute() or ".." in path.parts else name
