"""The offline demonstration: a synthetic world, its two encoders connected, and the result beside chance and null."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.trainer_utils import IntervalStrategy

from ..connect import Connection, bridge_config, connect, training_arguments
from ..evaluation.baselines import derange_by_name
from ..evaluation.connection import ROWS, Metrics, connector_metrics, format_table, mean_and_spread
from ..output import write_json
from ..pages.report import NOUNS
from ..training.data import Items
from ..training.recipe import Recipe, load_recipe
from ..training.train import train_connector

# The worlds by name, and what is in each.
RECIPES = {"sounds": "demo", "shapes": "shapes", "all": "all"}
CONTENTS = {
    "sounds": "drawn pictures, synthesised sounds, made-up sentences",
    "shapes": "solids as clouds and as rendered pictures, made-up sentences",
    "all": "drawn and rendered pictures, synthesised sounds, solids as clouds, made-up sentences",
}
NOTES = """
{cascade}ridge, procrustes and the linear map are fitted on the {bank}.
The bridges and posterior matching train nothing, but need all {bank} at every query;
{row} needs its {projectors} alone.
The null pairs no concept with itself, so it may fall below chance: a random guess is right at times.
"""
TWO_HOPS = (
    "Between sounds and point clouds, which share nothing, the untrained and the fitted rows go by way of CLIP: over\n"
    "the texts, then over the pictures.\n"
)


def run_demo(
    folder: str | os.PathLike[str],
    world: str = "sounds",
    *,
    seeds: int = 3,
    derangements: int = 20,
    report: Callable[[str], None] = print,
) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    """Connect a small CLIP in a world below `folder` and report a table; return means and deviations by method.

    Args:
        world: `sounds` (with a CLAP, through texts), `shapes` (with a ULIP, through pictures) or `all` (both extended
            into CLIP, which stays as it is).
        seeds: how many connectors the trained row averages; they differ in initial weights, order and noise.
        derangements: how many connectors the null row averages: the pairs between the spaces are permuted so that no
            item meets one of its own concept. What still retrieved then would not owe it to them.
    """
    threads = torch.get_num_threads()
    # Models this small cost more to hand to a second thread than to compute, many times more when a core is busy.
    torch.set_num_threads(1)
    try:
        return _run_demo(Path(folder), world, seeds, derangements, report)
    finally:
        torch.set_num_threads(threads)


def _run_demo(
    folder: Path, world: str, seeds: int, derangements: int, report: Callable[[str], None]
) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    recipe = load_recipe(RECIPES[world])
    data = write_recipe_world(recipe, folder / "world")
    report(f"world: {data} (synthetic: {CONTENTS[world]})")
    connection = connect(recipe, folder, data, report=report)
    if not connection.sets or connection.table is None:
        raise ValueError("The demo recipe has no evaluate section; restore the one of the package.")
    # For the null alone, which has to know what to set apart.
    concepts = {modality: _concepts(recipe, modality, data) for modality in recipe.modalities}
    count = len(set(concepts[recipe.modalities[0]]))
    row = ROWS[recipe.objective]

    runs = [connection.table[row]]
    nulls = []
    with tqdm(total=seeds - 1 + derangements, desc="more seeds and the null", unit="run") as bar:
        for seed in range(1, seeds):
            runs.append(_trained(connection, seed))
            bar.update()
        for draw in range(derangements):
            nulls.append(_trained(connection, draw, _derangements(recipe, concepts, draw)))
            bar.update()

    table = {name: metrics for name, metrics in connection.table.items() if name != row}
    spread: dict[str, Metrics] = {}
    for name, results in ((f"{row}, {seeds} seeds", runs), (f"null, {derangements} derangements", nulls)):
        if results:
            table[name], deviation = mean_and_spread(results)
            if len(results) > 1:
                spread[name] = deviation
    write_json(folder / "demo.json", {"synthetic": True, "mean": table, "standard_deviation": spread})
    command = "cmcr demo" + ("" if world == "sounds" else f" --world {world}")
    page = connection.write_report(table, spread, f"{command} --seeds {seeds} --derangements {derangements}")
    *first, last = (f"{len(items)} {NOUNS[modality][1]}" for modality, items in connection.media.items())
    counts = f"{', '.join(first)} and {last}"
    report(
        f"\nClass-level retrieval among {counts} of {count} concepts, none of which any training saw.\n"
        "All data is SYNTHETIC, that of the encoders' own training included.\n"
    )
    report(format_table(table, spread))
    cascade = "The closed cascade knows the class names, no other row does. " if "closed cascade" in table else ""
    banks = [NOUNS[bridge.overlap][1] for bridge in recipe.bridges]
    projectors = "two projectors" if recipe.objective == "c-mcr" else f"projectors of {' and '.join(recipe.others)}"
    report(NOTES.format(bank=" and ".join(banks), cascade=cascade, row=row, projectors=projectors))
    if len(banks) > 1:
        report(TWO_HOPS)
    report(f"Look at it: {page}")
    report(f'Load it: CMCRModel.from_pretrained("{folder / "model"}")')
    return table, spread


def _concepts(recipe: Recipe, modality: str, world: Path) -> list[str]:
    """Return the concept of each training item of a modality."""
    label = "concept" if modality == "text" else "parent"
    specs = [replace(spec, label=label) for spec in getattr(recipe, modality)]
    return [str(item.label) for item in Items(specs, modality, world)]


def _derangements(
    recipe: Recipe, concepts: Mapping[str, Sequence[str]], draw: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Draw for each bridge an order of the rows of each pool in which none meets one of its own concept.

    No concept is sent to one and the same other by two bridges, or what they send there would meet again.
    """
    orders: dict[str, dict[str, torch.Tensor]] = {}
    sent: set[tuple[str, str]] = set()
    for bridge in recipe.bridges:
        for seed in itertools.count(draw, 1000):
            # One seed sends the concepts of all pools alike.
            drawn = {
                pool: derange_by_name(concepts[pool], torch.Generator().manual_seed(seed)) for pool in bridge.pools
            }
            names = concepts[bridge.pools[0]]
            now = {(names[row], names[partner]) for row, partner in enumerate(drawn[bridge.pools[0]].tolist())}
            if not now & sent:
                break
        orders[bridge.space], sent = drawn, sent | now
    return orders


def _trained(
    connection: Connection, seed: int, orders: Mapping[str, Mapping[str, torch.Tensor]] | None = None
) -> Metrics:
    """Train every bridge with another seed and measure what comes of it.

    Args:
        orders: by bridge and pool, of the rows on the other side than CLIP's. All vectors of a row on that side move
            together: only the pairing between the spaces is broken.
    """
    if not connection.sets:
        raise ValueError("The connection was not evaluated: give its recipe an evaluate section.")
    spec = replace(connection.recipe.train, seed=seed)
    connector = deepcopy(connection.model.connector)
    for bridge in connection.recipe.bridges:
        pools = connection.training_embeds(bridge.space)
        for pool, order in (orders or {}).get(bridge.space, {}).items():
            pools[pool] = {
                name: rows if name.startswith("clip") else rows[order] for name, rows in pools[pool].items()
            }
        args = training_arguments(spec, connection.folder / "train", "cpu")
        args.save_strategy = args.logging_strategy = IntervalStrategy.NO
        args.disable_tqdm = True
        config = bridge_config(connection.model.config, bridge)
        trained, _ = train_connector(config, list(pools.values()), args, log_lines=False)
        for space in bridge.spaces:
            connector.projectors[space].load_state_dict(trained.projectors[space].state_dict())
    return connector_metrics(connector, connection.sets)


def write_recipe_world(recipe: Recipe, folder: Path) -> Path:
    """Write the synthetic world that a recipe asks for, or keep the one that is there (see `write_world`)."""
    counts = recipe.world or {}
    if recipe.others == ["ulip"]:
        from .shapes_world import write_shapes_world

        return write_shapes_world(folder, **counts)
    if len(recipe.others) == 2:
        from .all_world import write_all_world

        return write_all_world(folder, **counts)
    from .world import write_world

    return write_world(folder, **counts)
