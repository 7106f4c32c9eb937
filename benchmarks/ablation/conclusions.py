"""Put into plain sentences what the tables of a study say, by fixed rules and not by hand."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from cmcr_hf.evaluation.connection import mean_and_spread

from .results import Effect, Table, effect_between, mean_map
from .variants import FULL, NULL, OBJECTIVES, PARTS, Variant

# What needs no training, but the whole bank at inference.
BRIDGES = ("one-way bridge", "two-way bridge", "posterior matching")


def conclusions(tables: Sequence[Table]) -> dict[str, list[str]]:
    """Return sentences under headings."""
    found = {
        "What each part of the method earns": [_part(tables, variant) for variant in _variants(tables, PARTS)],
        "What other settings change": [
            sentence
            for group in dict.fromkeys(variant.group for table in tables for variant in table.runs)
            if group not in ("", PARTS, OBJECTIVES)
            for sentence in [_group(tables, group)]
        ],
        "Against ways without a connector": [_against(table) for table in tables],
        "Which objective": [sentence for table in tables for sentence in _objectives(table)],
    }
    return {heading: sentences for heading, sentences in found.items() if sentences}


def _variants(tables: Sequence[Table], group: str) -> list[Variant]:
    return list(dict.fromkeys(variant for table in tables for variant in table.groups.get(group, [])))


def _part(tables: Sequence[Table], variant: Variant) -> str:
    effects = {table.title: table.effect(variant) for table in tables if variant in table.runs}
    figures = ", ".join(f"{_signed(effect)} with {title}" for title, effect in effects.items())
    verdicts = {effect.verdict for effect in effects.values()}
    if all(verdict.startswith("loses") for verdict in verdicts):
        word = "as the paper says, the part helps"
        if any(verdict.endswith("a little") for verdict in verdicts):
            word += ", if only a little in places"
    elif verdicts == {"none"}:
        word = "the paper says that the part helps; no difference can be told here"
    elif any(verdict.startswith("gains") for verdict in verdicts):
        word = "unlike what the paper says, the part does harm somewhere here"
    else:
        word = "the paper says that the part helps; here it does in one case and not in the other"
    return f"{_capital(variant.name)}: mean mAP {figures}; {word}."


def _group(tables: Sequence[Table], group: str) -> str:
    parts = []
    for table in tables:
        effects = {variant.name: table.effect(variant) for variant in table.groups.get(group, [])}
        if not effects:
            continue
        gains = {name: effect for name, effect in effects.items() if effect.verdict.startswith("gains")}
        losses = {name: effect for name, effect in effects.items() if effect.verdict.startswith("loses")}
        words = []
        if gains:
            best = max(gains, key=lambda name: gains[name].mean)
            words.append(f"{best} gains most, {_signed(gains[best])}")
        if losses:
            worst = min(losses, key=lambda name: losses[name].mean)
            words.append(f"{worst} loses most, {_signed(losses[worst])}")
        if not words:
            words.append("nothing that can be told from what it is compared with")
        parts.append(f"with {table.title} {', '.join(words)}")
    return f"{_capital(group)}: {'; '.join(parts)}."


def _against(table: Table) -> str:
    full = statistics.fmean(map(mean_map, table.full))
    ways = {name: mean_map(metrics) for name, metrics in table.free.items()}
    null = next((runs for variant, runs in table.runs.items() if variant.name == NULL), None)
    text = f"With {table.title}, the paper's method reaches a mean mAP of {full:.3f}"
    text += f", chance is {ways['chance']:.3f}"
    if null is not None:
        text += f", the null {statistics.fmean(map(mean_map, null)):.3f}"
    if "closed cascade" in ways:
        text += f", and the closed cascade, which knows the classes, {ways['closed cascade']:.3f}"
    bridges = {name: effect_between(table.full, [table.free[name]] * len(table.full)) for name in _bridges(table)}
    better = [f"{name} ({ways[name]:.3f})" for name, effect in bridges.items() if effect.verdict.startswith("loses")]
    level = [f"{name} ({ways[name]:.3f})" for name, effect in bridges.items() if effect.verdict == "none"]
    if better:
        text += f". It loses to what needs no training but the whole bank at inference: {', '.join(better)}"
    if level:
        text += f". No difference can be told from {', '.join(level)}"
    if not better and not level:
        text += ". It beats every bridge without training"
    return f"{text}."


def _bridges(table: Table) -> list[str]:
    return [name for name in BRIDGES if name in table.free]


def _objectives(table: Table) -> list[str]:
    rows = {variant.name: runs for variant, runs in table.runs.items() if variant.group == OBJECTIVES}
    rows |= {variant.name: runs for variant, runs in table.runs.items() if variant.name == FULL}
    if len(rows) < 2:
        return []
    means = {name: statistics.fmean(map(mean_map, runs)) for name, runs in rows.items()}
    best = max(means, key=lambda name: means[name])
    level = [name for name in means if effect_between(rows[best], rows[name]).verdict == "none" and name != best]
    others = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if name not in (best, *level))
    text = f"With {table.title}, {best} is best: {means[best]:.3f}"
    if level:
        text = f"With {table.title}, no difference can be told between {best} ({means[best]:.3f}) and "
        text += " and ".join(f"{name} ({means[name]:.3f})" for name in level)
    share = ""
    if "closed cascade" in table.free:
        mean, _ = mean_and_spread(rows[best])
        shares = [f"{mean[way]['mAP'] / part['mAP']:.2f}" for way, part in table.free["closed cascade"].items()]
        share = f" That is {' and '.join(shares)} of the closed cascade's mAP."
    return [f"{text}{f' (the others: {others})' if others else ''}.{share}"]


def _signed(effect: Effect) -> str:
    return f"{effect.mean:+.3f} ± {effect.half_width:.3f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
