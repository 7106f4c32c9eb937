"""The offline demonstration: a synthetic world, its two encoders connected, and the result beside chance and null."""

from __future__ import annotations

import csv
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
from ..training.recipe import load_recipe
from ..training.train import train_connector
from .world import write_world

NOTES = """
The closed cascade knows the class names, no other row does. ridge and procrustes are maps fitted on the texts. The
bridges and posterior matching train nothing, but need all texts at every query; C-MCR needs its two projectors alone.
The null pairs no concept with itself, so it may fall below chance: a random guess is right at times.
"""


def run_demo(
    folder: str | os.PathLike[str],
    *,
    seeds: int = 3,
    derangements: int = 20,
    report: Callable[[str], None] = print,
) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    """Run the `demo` recipe below `folder` and report a table; return means and standard deviations by method.

    Args:
        seeds: how many connectors the C-MCR row averages; they differ in initial weights, order and noise.
        derangements: how many connectors the null row averages: the text pairs between the spaces are permuted so
            that no text meets one of its own concept. What still retrieved then would not owe it to the texts.
    """
    threads = torch.get_num_threads()
    # Models this small cost more to hand to a second thread than to compute, many times more when a core is busy.
    torch.set_num_threads(1)
    try:
        return _run_demo(Path(folder), seeds, derangements, report)
    finally:
        torch.set_num_threads(threads)


def _run_demo(
    folder: Path, seeds: int, derangements: int, report: Callable[[str], None]
) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    recipe = load_recipe("demo")
    world = write_world(folder / "world", **(recipe.world or {}))
    report(f"world: {world} (synthetic: drawn pictures, synthesised sounds, made-up sentences)")
    connection = connect(recipe, folder, world, report=report)
    if connection.items is None or connection.table is None:
        raise ValueError("The demo recipe has no evaluate section; restore the one of the package.")
    embeds = connection.training_embeds()
    with (world / "texts.csv").open(newline="", encoding="utf-8") as file:
        concepts = [row["concept"] for row in csv.DictReader(file)]

    runs = [connection.table["C-MCR"]]
    nulls = []
    with tqdm(total=seeds - 1 + derangements, desc="more seeds and the null", unit="run") as bar:
        for seed in range(1, seeds):
            runs.append(_trained(connection, embeds, seed))
            bar.update()
        for draw in range(derangements):
            order = derange_by_name(concepts, torch.Generator().manual_seed(draw))
            # Both of a text's CLAP-side vectors move together: only the pairing between the spaces is broken.
            deranged = {name: rows[order] if name.startswith("clap") else rows for name, rows in embeds.items()}
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
    page = connection.write_report(table, spread, f"cmcr demo --seeds {seeds} --derangements {derangements}")
    pictures, sounds = len(connection.items.image), len(connection.items.audio)
    report(
        f"\nClass-level retrieval among {pictures} pictures and {sounds} sounds of {len(set(concepts))} concepts, "
        "none of which any training saw.\nAll data is SYNTHETIC, that of the encoders' own training included.\n"
    )
    report(format_table(table, spread))
    report(NOTES)
    report(f"Look at it: {page}")
    report(f'Load it: CMCRModel.from_pretrained("{folder / "model"}")')
    return table, spread


def _trained(connection: Connection, embeds: dict[str, torch.Tensor], seed: int) -> Metrics:
    if connection.items is None:
        raise ValueError("The connection was not evaluated: give its recipe an evaluate section.")
    spec = replace(connection.recipe.train, seed=seed)
    args = training_arguments(spec, connection.folder / "train", "cpu")
    args.save_strategy = args.logging_strategy = IntervalStrategy.NO
    args.disable_tqdm = True
    connector, _ = train_connector(connection.model.config, embeds, args, log_lines=False)
    return connector_metrics(connector, connection.items)
