"""The retrieval task: rank the items of either side of a paired set by a model, beside what needs no training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from ..modeling.configuration_cmcr import CMCRConfig
from ..training.data import Items
from ..training.embed import source_record
from ..training.posteriors import choose_temperatures
from ..training.store import EmbeddingStore, check_made_by, check_same_keys
from .baselines import (
    BRIDGE_TEMPERATURE,
    POSTERIOR_TEMPERATURE,
    TRAINING_FREE,
    Scorer,
    baseline_scorers,
    inner_scorer,
)
from .bootstrap import Intervals, bootstrap_means, bootstrap_means_of_sides, bootstrap_statistic
from .embedding import EvaluatedModel
from .pairs import PairedSet
from .result import CHANCE, MODEL, Case, Published, Shown, first_of_classes, number, said, shown
from .retrieval import expected_average_precision, first_rank, pair_chance, pair_values, relevance_values

MEAN = "mean of both directions"
BY_CLASS = ", by class"
PAIR_KS, CLASS_KS = (1, 5, 10), (1, 10)
_FREEBIND = "FreeBind (arXiv 2405.04883), tables 3 and 4, the mean of both directions"
_NUMBERS = {
    "audiocaps": (
        ("C-MCR", 0.1576, 0.4137),
        ("Ex-MCR", 0.1907, 0.4705),
        ("ImageBind", 0.0924, 0.2747),
        ("WAV2CLIP", 0.0088, 0.0422),
        ("AudioCLIP", 0.0353, 0.1130),
    ),
    "vgg-ss": (
        ("C-MCR", 0.0194, 0.0769),
        ("Ex-MCR", 0.0213, 0.0813),
        ("ImageBind", 0.1482, 0.3567),
        ("WAV2CLIP", 0.0251, 0.0928),
        ("AudioCLIP", 0.0125, 0.0391),
    ),
    "flickr-soundnet": (
        ("C-MCR", 0.0139, 0.0597),
        ("Ex-MCR", 0.0157, 0.0594),
        ("ImageBind", 0.0768, 0.2079),
        ("WAV2CLIP", 0.0082, 0.0341),
        ("AudioCLIP", 0.0137, 0.0491),
    ),
    "coco": (
        ("C-MCR", 0.1667, 0.3704),
        ("Ex-MCR", 0.4024, 0.6478),
        ("ImageBind", 0.5728, 0.7954),
        ("WAV2CLIP", 0.4024, 0.6478),
        ("AudioCLIP", 0.1751, 0.3750),
    ),
}
# Of how many items the numbers are. The list of VGG-SS names 5,158, of which the papers take 5,000; that which is
# named for Flickr-SoundNet has 250.
_SIZES: dict[str, dict[str, list[int]]] = {
    "audiocaps": {"clips": [975]},
    "vgg-ss": {"clips": [5000, 5158]},
    "flickr-soundnet": {"clips": [5000]},
    "coco": {"images": [5000]},
}
PUBLISHED = {
    layout: [
        Published(model, {MEAN: {"R@1": first, "R@5": fifth}}, _FREEBIND, _SIZES[layout])
        for model, first, fifth in rows
    ]
    for layout, rows in _NUMBERS.items()
}
# Scores of one block, 64 MB in float32, and those that are ranked at once.
_SCORED, _RANKED = 2**24, 2**21
CASES, FOUND = 8, 5
# Of fewer, too few texts are left to answer when some ask.
_LEAST_BANK = 4


@dataclass
class Methods:
    """The model and what there is to compare with it, over the items that can be read.

    Args:
        spaces: the sources that embed the sides.
        scorers: by method, what scores some rows of either side.
        temperatures: of the bridges, and of posterior matching by space, where they are among them.
        notes: for the reader of a result.
        comparable: whether the bank, if any, can tell items apart, so that what needs it says something.
    """

    data: PairedSet
    spaces: Sequence[str]
    scorers: dict[str, tuple[Scorer, Scorer]] = field(default_factory=dict)
    temperatures: dict[str, float | dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    comparable: bool = True


@dataclass
class Ranked:
    """What the rankings of all methods gave.

    Args:
        metrics, intervals: as those of an [`EvaluationResult`].
        precision: average precision of every query of the first side with the model, `(items,)`; of data without
            pairs, by class.
        ahead: by group and method that needs no training, the interval of how far its mAP is above the model's, over
            draws of the same queries; None without resamples.
        notes: for the reader of a result.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    intervals: dict[str, dict[str, Intervals]]
    precision: torch.Tensor
    ahead: dict[str, dict[str, tuple[float, float] | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build_scorers(
    model: EvaluatedModel,
    data: PairedSet,
    *,
    bank: Items | Mapping[str, EmbeddingStore] | None = None,
    text_space: str | None = None,
) -> Methods:
    """Embed both sides, and return the model and what there is to compare with it as functions that score.

    Of sides that lie in one source space, that source alone; of others the cosine as if their spaces were one, where
    their widths agree, the baselines over a bank, and, for texts, the source of the other side alone, where it has a
    text tower: there, the modalities were paired in training. Posterior matching takes the temperatures that the
    model was trained with, by bridge distillation; of other models they are chosen from the bank and the items of both
    sides (see [`choose_temperatures`]), of which neither pairs nor classes are looked at. Items that cannot be read
    are left out.

    Args:
        bank: items of a modality that both spaces have, or their stores by space.
        text_space: of the texts; by default that of the model.

    Raises:
        ValueError: a space does not embed the bank, another source made a store of it, or both sides lie in one;
            nothing is embedded before.
    """
    config, modalities = model.model.config, data.modalities
    spaces = source_spaces(config, data, bank, text_space)
    if bank is not None and not isinstance(bank, Items):
        _check_sources(model, [bank[space] for space in spaces])
    data, (first, second) = _readable_embeds(model, data, spaces)
    methods = Methods(data, spaces)
    scorers: dict[str, tuple[Scorer, Scorer]] = {}
    if spaces[0] == spaces[1]:
        scorers[f"{spaces[0]} alone"] = (inner_scorer(first, second), inner_scorer(second, first))
    elif bank is not None:
        banks, modality = _bank_embeds(model, bank, spaces)
        names: list[torch.Tensor] = []
        if data.class_names and modality == "text":
            words = Items.listed("text", [name.replace("_", " ") for name in data.class_names])
            names = [model.source_embeds(words, space) for space in spaces]
        chosen, note = posterior_temperatures(config, spaces, banks, (first, second))
        posteriors = dict(zip(spaces, chosen, strict=True))
        methods.temperatures = {"bridge_temperature": BRIDGE_TEMPERATURE, "posterior_temperatures": posteriors}
        methods.notes = [note]
        if any(_is_uniform(bank) for bank in banks):
            methods.comparable = False
            methods.notes.append(
                f"The bank has one {modality}, or several that a source cannot tell apart, so that it cannot tell "
                "items apart: what needs it says nothing of the model."
            )
        scorers |= baseline_scorers(first, second, *banks, *names, posterior_temperatures=chosen)
    else:
        both = sorted(set(config.modalities_of(spaces[0])) & set(config.modalities_of(spaces[1])))
        if both:
            methods.notes.append(
                f"The bridges and maps that connect {spaces[0]} and {spaces[1]} without training stand here with "
                f"--bank FILE: {' or '.join(f'{each}s' for each in both)}, which both embed."
            )
        if first.shape[1] == second.shape[1]:
            scorers["unconnected"] = (inner_scorer(first, second), inner_scorer(second, first))
    for side, own in enumerate(modalities):
        native = spaces[1 - side]
        if own == "text" and spaces[0] != spaces[1] and "text" in config.modalities_of(native):
            sources = [second, second] if side == 0 else [first, first]
            sources[side] = model.source_embeds(data.sides[side], native)
            scorers[f"{native} alone"] = (inner_scorer(*sources), inner_scorer(*sources[::-1]))
    a, b = (
        model.project(embeds, modality, space)
        for embeds, modality, space in zip((first, second), modalities, spaces, strict=True)
    )
    methods.scorers = {**scorers, MODEL: (inner_scorer(a, b), inner_scorer(b, a))}
    return methods


def _readable_embeds(
    model: EvaluatedModel, data: PairedSet, spaces: Sequence[str]
) -> tuple[PairedSet, list[torch.Tensor]]:
    """Return what of the data can be read, and its embeddings in the sources."""
    stores = [model.source_store(side, space, strict=False) for side, space in zip(data.sides, spaces, strict=True)]
    embeds = [store.tensor().float() for store in stores]
    if any(store.skipped for store in stores):
        data, rows = data.readable([set(store.keys()) for store in stores])
        embeds = [side[own] for side, own in zip(embeds, rows, strict=True)]
    return data, embeds


def _is_uniform(bank: torch.Tensor) -> bool:
    """Return whether the unit rows of a bank are one and the same, but for rounding."""
    return bool((bank @ bank[0]).min() > 1 - 1e-6)


def posterior_temperatures(
    config: CMCRConfig, spaces: Sequence[str], banks: Sequence[torch.Tensor], sides: Sequence[torch.Tensor]
) -> tuple[tuple[float, float], str]:
    """Return the temperatures of posterior matching in both spaces, and the sentence that tells them."""
    known = config.posterior_temperatures or {}
    chosen = (POSTERIOR_TEMPERATURE, POSTERIOR_TEMPERATURE)
    origin = "the usual ones of small encoders, since the bank is too small or too uniform to choose others"
    if all(space in known for space in spaces):
        chosen = (float(known[spaces[0]]), float(known[spaces[1]]))
        origin = "with which the model was trained"
    elif len(banks[0]) >= _LEAST_BANK:
        try:
            chosen = choose_temperatures(banks[0], sides[0], banks[1], sides[1])
            origin = "chosen from the bank and the items of both sides, without a look at pairs or classes"
        except ValueError:
            # The texts of the bank are all the same.
            pass
    told = " and ".join(f"{value:.3g} in {space}" for value, space in zip(chosen, spaces, strict=True))
    return chosen, f"Posterior matching takes the temperatures {told}, {origin}."


def source_spaces(
    config: CMCRConfig,
    data: PairedSet,
    bank: Items | Mapping[str, EmbeddingStore] | None = None,
    text_space: str | None = None,
) -> list[str]:
    """Return the source spaces of both sides, and check that the bank, if any, connects them.

    Raises:
        ValueError: a space does not embed the bank, or both sides lie in one.
    """
    spaces = [config.space_of(each, text_space if each == "text" else None) for each in data.modalities]
    if bank is not None and spaces[0] == spaces[1]:
        raise ValueError(f"Both sides lie in the {spaces[0]} space, which needs no bank. Leave it out.")
    if bank is not None:
        _check_bank(config, bank, spaces)
    return spaces


def _check_bank(config: CMCRConfig, bank: Items | Mapping[str, EmbeddingStore], spaces: Sequence[str]) -> None:
    if isinstance(bank, Items):
        for space in spaces:
            if bank.modality not in config.modalities_of(space):
                raise ValueError(
                    f"The {space} source embeds {' and '.join(config.modalities_of(space))}, but the bank has "
                    f"{bank.modality} items. Name a bank of what both sources embed."
                )
        return
    for space in spaces:
        width = (config.projectors or {})[space]["input_dim"]
        store = bank.get(space)
        if store is None or store.space != space or store.dim != width:
            found = "none" if store is None else f"one of {store.space}, {store.dim} wide"
            raise ValueError(
                f"Expected a store of the bank in {space}, {width} wide, got {found}. Embed it with both."
            )
    first, second = (bank[space] for space in spaces)
    both = [name for name in config.modalities_of(spaces[0]) if name in config.modalities_of(spaces[1])]
    if first.modality != second.modality or first.modality not in both:
        raise ValueError(
            f"The stores of the bank hold {first.modality} in {first.space} and {second.modality} in {second.space}, "
            f"expected one that both sources embed: {' or '.join(both) or 'there is none'}. Embed the same items with "
            "both."
        )
    check_same_keys((str(first.folder), first.keys()), (str(second.folder), second.keys()))


def _check_sources(model: EvaluatedModel, stores: Sequence[EmbeddingStore]) -> None:
    """Check that stores were made by the sources of a model, as far as it has records of them."""
    config = model.model.config
    for store in stores:
        known = (config.sources or {}).get(store.space)
        if known is not None:
            record = source_record(str(known["id"]), known.get("revision"), model.model.sources[store.space])
            width = (config.projectors or {})[store.space]["input_dim"]
            remedy = "Embed the bank with the sources of the model, or name its texts, --bank FILE."
            try:
                check_made_by(store, shown(record["id"]), record, width, remedy)
            except ValueError:
                # An evaluation's own store names the tower by its weights, in whatever file or repository they lie.
                if store.source != model.tower_record(store.space, store.modality):
                    raise


def _bank_embeds(
    model: EvaluatedModel, bank: Items | Mapping[str, EmbeddingStore], spaces: Sequence[str]
) -> tuple[list[torch.Tensor], str]:
    """Return the bank in each of two spaces, and what it is made of."""
    if isinstance(bank, Items):
        return [model.source_embeds(bank, space) for space in spaces], bank.modality
    first, second = (bank[space] for space in spaces)
    return [first.tensor().float(), second.tensor().float()], first.modality


def measure_rankings(
    data: PairedSet,
    scorers: Mapping[str, tuple[Scorer, Scorer]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Ranked:
    """Measure every method in both directions: pairs, their mean, and classes where there are any.

    Measures by class are of the items that have one, queries and gallery alike.

    The intervals of a direction are over its queries, the texts of one item drawn together. Those of the mean of both
    directions are over units of items that hang together by pairs (see [`PairedSet.units`]), each drawn with its
    queries of both directions, as the two have their items in common. There are none where one unit has more than half
    of the pairs, as draws would hardly differ.
    """
    directions = ["_to_".join((data.modalities[side], data.modalities[1 - side])) for side in (0, 1)]
    ks = [tuple(k for k in PAIR_KS if k <= data.sizes[1 - side]) for side in (0, 1)]
    found: dict[str, list[dict[str, dict[str, torch.Tensor]]]] = {
        CHANCE: [_chance_values(data, side, ks[side]) for side in (0, 1)]
    }
    total = len(scorers) * sum(data.sizes)
    with tqdm(total=total, desc="ranked", unit="query", disable=not progress) as bar:
        for method, both in scorers.items():
            found[method] = [_values(data, side, both[side], ks[side], bar.update) for side in (0, 1)]
    ranked = Ranked({method: {} for method in found}, {method: {} for method in found}, torch.empty(0))
    ranked.precision = next(iter(found[MODEL][0].values()))["mAP"]
    options = {"resamples": resamples, "seed": seed}
    units = _mean_units(data)
    if data.pairs is not None and units is None:
        ranked.notes.append(
            "The mean of both directions has no interval, since more than half of the pairs hang together by items "
            "that they share."
        )
    for method, sides in found.items():
        for direction, values in zip(directions, sides, strict=True):
            for suffix, rows in values.items():
                ranked.metrics[method][direction + suffix] = _summary(rows)
        if data.pairs is not None:
            there, back = (ranked.metrics[method][direction] for direction in directions)
            names = [name for name in there if name in back and name != "median rank"]
            ranked.metrics[method][MEAN] = {name: (there[name] + back[name]) / 2 for name in names}
    groups = len(scorers) * sum(map(len, found[MODEL]))
    with tqdm(total=groups, desc="resampled", unit="group", disable=not progress or not resamples) as bar:
        for method, side in itertools.product(scorers, (0, 1)):
            for suffix, rows in found[method][side].items():
                together, group = _query_groups(data, side, suffix), directions[side] + suffix
                ranked.intervals[method][group] = _summary_intervals(rows, together, **options)
                if method in TRAINING_FREE:
                    ahead = {"mAP": rows["mAP"] - found[MODEL][side][suffix]["mAP"]}
                    difference = bootstrap_means(ahead, groups=together, **options)
                    ranked.ahead.setdefault(group, {})[method] = difference.get("mAP")
                bar.update()
    for method in scorers if units else ():
        means = [{name: side[""][name] for name in ranked.metrics[method][MEAN]} for side in found[method]]
        intervals = bootstrap_means_of_sides(list(zip(means, units or (), strict=True)), **options)
        ranked.intervals[method][MEAN] = intervals
    return ranked


def _mean_units(data: PairedSet) -> list[torch.Tensor] | None:
    """Return of the queries of both directions what is drawn together for their mean, None where it says nothing."""
    if data.pairs is None:
        return None
    units = data.units()
    return units if 2 * int(units[0][data.pairs[:, 0]].bincount().max()) <= len(data.pairs) else None


def _values(
    data: PairedSet, side: int, scorer: Scorer, ks: Sequence[int], advance: Callable[[int], object]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return what the metrics of a direction are made of, `(queries,)` each, by the suffix of their group."""
    queries, gallery = data.sizes[side], data.sizes[1 - side]
    gold = None if data.pairs is None else data.gold(side)
    asked, among = _classified(data, side)
    class_ks = () if data.classes is None else _class_ks(data)
    scored, ranked = max(1, _SCORED // gallery), max(1, _RANKED // gallery)
    parts: dict[str, list[dict[str, torch.Tensor]]] = {}
    for begin in range(0, queries, scored):
        for place, scores in enumerate(scorer(slice(begin, begin + scored)).split(ranked)):
            rows = slice(begin + place * ranked, begin + place * ranked + len(scores))
            if gold is not None:
                parts.setdefault("", []).append(pair_values(scores, gold[rows], ks))
            if asked[rows].any():
                chosen = (asked[rows].nonzero(), among)
                values = relevance_values(scores[chosen], data.same_class(side, rows)[chosen], class_ks)
                parts.setdefault(_class_suffix(data), []).append(values)
            advance(len(scores))
    return {
        suffix: {name: torch.cat([part[name] for part in found]) for name in found[0]}
        for suffix, found in parts.items()
    }


def _classified(data: PairedSet, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which queries are measured by class, bool `(queries,)`, and the rows of the gallery that they are in."""
    asked = torch.zeros(data.sizes[side], dtype=torch.bool)
    if data.classes is None:
        return asked, torch.empty(0, dtype=torch.long)
    asked[data.classified(side)] = True
    return asked, data.classified(1 - side)


def _chance_values(data: PairedSet, side: int, ks: Sequence[int]) -> dict[str, dict[str, torch.Tensor]]:
    """Return what `_values` gives on average for random rankings."""
    queries, gallery = data.sizes[side], data.sizes[1 - side]
    values = {} if data.pairs is None else {"": pair_chance((data.gold(side) >= 0).sum(1), gallery, ks)}
    if data.classes is not None:
        step = max(1, _SCORED // gallery)
        blocks = (slice(begin, begin + step) for begin in range(0, queries, step))
        asked, among = _classified(data, side)
        relevant = torch.cat([data.same_class(side, rows).sum(1) for rows in blocks])[asked].double()
        found = {f"P@{k}": relevant / len(among) for k in _class_ks(data)}
        values[_class_suffix(data)] = found | {"mAP": expected_average_precision(relevant, len(among))}
    return values


def _class_ks(data: PairedSet) -> tuple[int, ...]:
    return tuple(k for k in CLASS_KS if k <= min(len(data.classified(side)) for side in (0, 1)))


def _class_suffix(data: PairedSet) -> str:
    return "" if data.pairs is None else BY_CLASS


def _query_groups(data: PairedSet, side: int, suffix: str) -> torch.Tensor | None:
    """Return which queries of a group of metrics are drawn together: the texts of one item."""
    if data.modalities[side] != "text" or data.pairs is None:
        return None
    items = data.gold(side)[:, 0]
    items = items[data.classified(side)] if suffix == BY_CLASS else items
    groups: torch.Tensor = items.unique(return_inverse=True)[1]
    return groups


def _summary(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    means = {name: rows.mean().item() for name, rows in values.items() if name != "rank"}
    return means | ({"median rank": values["rank"].quantile(0.5).item()} if "rank" in values else {})


def _summary_intervals(
    values: Mapping[str, torch.Tensor], groups: torch.Tensor | None, *, resamples: int, seed: int
) -> Intervals:
    means = {name: rows for name, rows in values.items() if name != "rank"}
    found = bootstrap_means(means, groups=groups, resamples=resamples, seed=seed)
    if "rank" in values:
        ranks = values["rank"]
        items = len(ranks) if groups is None else groups

        def median(rows: torch.Tensor) -> dict[str, float]:
            return {"median rank": ranks[rows].quantile(0.5).item()}

        found |= bootstrap_statistic(median, items, resamples=resamples, seed=seed)
    return found


def compare_with_bridges(ranked: Ranked) -> list[str]:
    """Return a sentence that says which ranks better, the model or what needs no training, where that can be told.

    It can where the interval of the difference of their mAP, over draws of the same queries, excludes 0. Of several
    that need no training, that of the largest mAP counts.
    """
    told = []
    for group, ahead in ranked.ahead.items():
        own = ranked.metrics[MODEL][group]["mAP"]
        rivals = {name: ranked.metrics[name][group]["mAP"] for name in ahead}
        best = max(rivals, key=lambda name: rivals[name])
        interval = ahead[best]
        if interval is None:
            return ["Without resamples, no difference can be told between the model and what needs no training."]
        low, high = interval
        verdict = "no difference can be told"
        if low > 0 or high < 0:
            verdict = f"{best if low > 0 else 'the model'} ranks better"
        ends = f"[{number(low)}, {number(high)}]"
        told.append(
            f"{said(group)}, {verdict} ({best} {number(rivals[best])}, the model {number(own)}, "
            f"difference {number(rivals[best] - own)} {ends})"
        )
    if not told:
        return []
    return [f"The model beside what needs no training, but the bank at every query, by mAP: {'; '.join(told)}."]


def ranking_cases(data: PairedSet, scorer: Scorer, precision: torch.Tensor) -> tuple[list[Case], list[Case]]:
    """Return queries of the first side that are answered best and worst, with what is ranked first for them.

    They are of the better and of the worse half, of a class a few at most while there are others.
    """
    order = precision.argsort(descending=True, stable=True).tolist()
    half = max(CASES, len(order) // 2)
    chosen = [
        first_of_classes(rows, lambda row: _label(data, 0, row), CASES) for rows in (order[:half], order[half:][::-1])
    ]
    found: dict[int, tuple[list[int], list[float], set[int]]] = {}
    notes: dict[int, str] = {}
    for row in [row for part in chosen for row in part]:
        scores = scorer(slice(row, row + 1))[0]
        right = data.right(0, row)
        first = scores.sort(descending=True, stable=True).indices[:FOUND].tolist()
        places = torch.tensor(sorted(right))
        best = int(places[scores[places].argmax()])
        better, tied = (scores > scores[best]).sum(), scores == scores[best]
        # As the metrics count ties.
        rank = f"{first_rank(better, tied.sum(), tied[places].sum()).item():,.1f}".removesuffix(".0")
        notes[row] = f"its average precision; the first right one is at rank {rank} of {len(scores):,}"
        if not right & set(first):
            # What should have been found stands last.
            first = [*first[: FOUND - 1], best]
        found[row] = (first, scores[first].tolist(), right)
    queries = data.sides[0].pick(found)
    results = data.sides[1].pick({place for first, _, _ in found.values() for place in first})

    def case(row: int) -> Case:
        first, scores, right = found[row]
        query = Shown(data.modalities[0], queries[row].value, queries[row].key, _label(data, 0, row))
        shown = [
            Shown(data.modalities[1], item.value, item.key, _label(data, 1, place), score, place in right)
            for place, score in zip(first, scores, strict=True)
            for item in [results[place]]
        ]
        return Case(query, precision[row].item(), shown, note=notes[row])

    return [case(row) for row in chosen[0]], [case(row) for row in chosen[1]]


def _label(data: PairedSet, side: int, row: int) -> str | None:
    if data.classes is None:
        return None
    return ", ".join(data.class_names[place] for place in data.classes[side][row].nonzero()[:, 0].tolist())
