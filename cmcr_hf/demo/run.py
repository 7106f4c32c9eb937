"""The offline demonstration: a synthetic world, its two encoders connected, and the result beside chance and null."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.trainer_utils import IntervalStrategy

from ..connect import Connection, connect, training_arguments
from ..evaluation.baselines import derange_by_name
from ..evaluation.connection import Metrics, connector_metrics, format_table, mean_and_spread
from ..output import write_json
from ..pages.report import NOUNS
from ..training.data import Items
from ..training.recipe import Recipe, load_recipe
from ..training.train import train_connector

# The worlds by name, and what is in each by the space that CLIP is connected with.
RECIPES = {"sounds": "demo", "shapes": "shapes"}
CONTENTS = {
    "clap": "drawn pictures, synthesised sounds, made-up sentences",
    "ulip": "solids as clouds and as rendered pictures, made-up sentences",
}
NOTES = """
{cascade}ridge and procrustes are maps fitted on the {bank}. The
bridges and posterior matching train nothing, but need all {bank} at every query; C-MCR needs its two projectors alone.
The null pairs no concept with itself, so it may fall below chance: a random guess is right at times.
"""


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
        world: `sounds` (with a CLAP, through texts) or `shapes` (with a ULIP, through pictures).
        seeds: how many connectors the C-MCR row averages; they differ in initial weights, order and noise.
        derangements: how many connectors the null row averages: the native pairs between the spaces are permuted so
            that no text (picture) meets one of its own concept. What still retrieved then would not owe it to them.
    """
    threads = torch.get_num_threads()
    # Models this small cost more to hand to a second thread than to compute, many times more when a core is busy.
    torch.set_num_threads(1)
    try:
        return _run_demo(Path(folder), load_recipe(RECIPES[world]), seeds, derangements, report)
    finally:
        torch.set_num_threads(threads)


def _run_demo(
    folder: Path, recipe: Recipe, seeds: int, derangements: int, report: Callable[[str], None]
) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    world = write_recipe_world(recipe, folder / "world")
    report(f"world: {world} (synthetic: {CONTENTS[recipe.other]})")
    connection = connect(recipe, folder, world, report=report)
    if not connection.sets or connection.table is None:
        raise ValueError("The demo recipe has no evaluate section; restore the one of the package.")
    embeds = connection.training_embeds()
    # For the null alone, which has to know what to set apart.
    label = "concept" if recipe.overlap == "text" else "parent"
    specs = [replace(spec, label=label) for spec in getattr(recipe, recipe.overlap)]
    concepts = [str(item.label) for item in Items(specs, recipe.overlap, world)]

    runs = [connection.table["C-MCR"]]
    nulls = []
    with tqdm(total=seeds - 1 + derangements, desc="more seeds and the null", unit="run") as bar:
        for seed in range(1, seeds):
            runs.append(_trained(connection, embeds, seed))
            bar.update()
        for draw in range(derangements):
            order = derange_by_name(concepts, torch.Generator().manual_seed(draw))
            # Both of an item's vectors on the other side move together: only the pairing between the spaces is broken.
            deranged = {name: rows if name.startswith("clip") else rows[order] for name, rows in embeds.items()}
            nulls.append(_trained(connection, deranged, draw))
            bar.update()

    table = {name: metrics for name, metrics in connection.table.items() if name != "C-MCR"}
    spread: dict[str, Metrics] = {}
    for name, results in ((f"C-MCR, {seeds} seeds", runs), (f"null, {derangements} derangements", nulls)):
        if results:
            table[name], deviation = mean_and_spread(results)
            if len(results) > 1:
                spread[name] = deviation
    write_json(folder / "demo.json", {"synthetic": True, "mean": table, "standard_deviation": spread})
    command = "cmcr demo" + ("" if recipe.other == "clap" else " --world shapes")
    page = connection.write_report(table, spread, f"{command} --seeds {seeds} --derangements {derangements}")
    *first, last = (f"{len(items)} {NOUNS[modality][1]}" for modality, items in connection.media.items())
    counts = f"{', '.join(first)} and {last}"
    report(
        f"\nClass-level retrieval among {counts} of {len(set(concepts))} concepts, none of which any training saw.\n"
        "All data is SYNTHETIC, that of the encoders' own training included.\n"
    )
    report(format_table(table, spread))
    cascade = "The closed cascade knows the class names, no other row does. " if "closed cascade" in table else ""
    report(NOTES.format(bank=NOUNS[recipe.overlap][1], cascade=cascade))
    report(f"Look at it: {page}")
    report(f'Load it: CMCRModel.from_pretrained("{folder / "model"}")')
    return table, spread


def _trained(connection: Connection, embeds: dict[str, torch.Tensor], seed: int) -> Metrics:
    if not connection.sets:
        raise ValueError("The connection was not evaluated: give its recipe an evaluate section.")
    spec = replace(connection.recipe.train, seed=seed)
    args = training_arguments(spec, connection.folder / "train", "cpu")
    args.save_strategy = args.logging_strategy = IntervalStrategy.NO
    args.disable_tqdm = True
    connector, _ = train_connector(connection.model.config, embeds, args, log_lines=False)
    return connector_metrics(connector, connection.sets)


def write_recipe_world(recipe: Recipe, folder: Path) -> Path:
    """Write the synthetic world that a recipe asks for, or keep the one that is there (see `write_world`)."""
    counts = recipe.world or {}
    if recipe.other == "ulip":
        from .shapes_world import write_shapes_world

        return write_shapes_world(folder, **counts)
    from .world import write_world

    return write_world(folder, **counts)
