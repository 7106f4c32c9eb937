"""Zero-shot classification: the class of an item is that whose prompts are nearest to it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..training.data import Items, load_table
from .bootstrap import Intervals, bootstrap_means, bootstrap_statistic
from .classification import average_precision_of_draws, class_accuracy, class_embeds, top_1_hits, top_k_hits
from .connection import CLASSIFICATION
from .embedding import EvaluatedModel
from .labelled import LabelledSet
from .modelnet40 import TEMPLATES as POINT_CLOUD_TEMPLATES
from .result import CHANCE, MODEL, Breakdown, Case, Published, Shown, counted
from .retrieval import expected_average_precision

# The subset of the 80 templates of the CLIP paper that its authors found to do better than all of them, in
# notebooks/Prompt_Engineering_for_ImageNet.ipynb of github.com/openai/CLIP (MIT). Selected on ImageNet itself.
IMAGE_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# What CLAP is evaluated with (arXiv 2206.04769, and LAION's own script); ensembles were found to gain nothing beyond
# well-formed names (2409.13676).
AUDIO_TEMPLATES = ("This is a sound of {}.",)
TEMPLATES: dict[str, Sequence[str]] = {
    "image": IMAGE_TEMPLATES,
    "audio": AUDIO_TEMPLATES,
    "point_cloud": POINT_CLOUD_TEMPLATES,
}

# What a reader must know of numbers with the default templates.
TEMPLATE_NOTES = {
    "image": "The seven templates were selected on ImageNet. CLIP's paper takes 80 (--prompts), and names of its own "
    "for the classes of ImageNet (--names).",
    "audio": None,
    "point_cloud": "The templates are worded by this package. Published numbers are of ULIP's 64 (--prompts).",
}
_FREEBIND = "FreeBind, tables 3 and 4, on all 2,000 clips; with which prompts is not known here"
_UNCHECKED = "C-MCR (arXiv 2305.14381) and Ex-MCR (2310.08884), not checked against the papers"
PUBLISHED = {
    "esc-50": [
        Published(model, {CLASSIFICATION: {"top-1": accuracy}}, _FREEBIND, {"items": [2000]})
        for model, accuracy in (
            ("C-MCR", 0.6605),
            ("Ex-MCR", 0.6835),
            ("ImageBind", 0.6725),
            ("WAV2CLIP", 0.1740),
            ("AudioCLIP", 0.1145),
        )
    ],
    "modelnet40": [
        Published(model, {CLASSIFICATION: metrics}, _UNCHECKED, {"items": [2468]})
        for model, metrics in (
            ("C-MCR", {"top-1": 0.649, "top-3": 0.870, "top-5": 0.928}),
            ("Ex-MCR", {"top-1": 0.665, "top-3": 0.879, "top-5": 0.936}),
        )
    ],
}
# Cases and confusions that a result holds, and classes that a case shows.
CASES, CONFUSED, FOUND = 8, 20, 5


def read_templates(path: Path) -> list[str]:
    """Read templates, each with one `{}` for the name of a class: lines, or a JSON list."""
    column = next(iter(load_table(path).values()))
    templates = [text.strip() for text in map(str, column) if text.strip()]
    if not templates:
        raise ValueError(f"There are no templates in {path}. Write one a line, such as: a photo of a {{}}.")
    return templates


def zero_shot_scores(
    model: EvaluatedModel, data: LabelledSet, templates: Sequence[str], *, text_space: str | None = None
) -> tuple[LabelledSet, torch.Tensor]:
    """Return the items that can be read, and the cosine of each with every class, `(items, classes)`.

    A class is the normalised mean of the normalised embeddings of its prompts: every template with each of its names.

    Args:
        templates: sentences with one `{}`.
        text_space: the source that embeds the prompts; by default that which the model's texts go through.

    Raises:
        ValueError: a template has not one `{}`, or no item can be read.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"Expected a template with one {{}} for the name of a class, got {template!r}.")
    prompts, classes = [], []
    for index, words in enumerate(data.words):
        prompts += [template.replace("{}", word) for word in words for template in templates]
        classes += [index] * (len(words) * len(templates))
    texts = model.embeds(Items.listed("text", prompts), text_space)
    store = model.source_store(data.items, strict=False)
    embeds = model.project(store.tensor().float(), data.items.modality)
    return data.readable({*store.keys()}) if store.skipped else data, embeds @ class_embeds(texts, classes).T


@dataclass
class Measured:
    """What became of a set: metrics by method, intervals of the model's, and what the page shows of it.

    Args:
        by_class: of each class the accuracy, or the average precision, NaN where no item has it.
    """

    metrics: dict[str, dict[str, float]]
    intervals: Intervals
    by_class: torch.Tensor


def measure(
    scores: torch.Tensor, data: LabelledSet, *, resamples: int = 1000, seed: int = 0, progress: bool = False
) -> Measured:
    """Measure `(items, classes)` scores.

    Items of one class: top-1, top-3 and top-5 accuracy, as far as there are so many classes, and the mean of the
    classes' top-1 accuracies. Items of several: the mean of the classes' average precisions, mAP, and the share of
    items of which the best class is one of theirs, top-1. Classes without an item are left out of the means.

    Args:
        resamples, seed: of the bootstrap, which draws items.
    """
    relevant, classes = data.relevant, len(data.classes)
    if data.several:
        mean, values = "mAP", {"top-1": top_1_hits(scores, relevant)}
        by_class = average_precision_of_draws(scores, relevant)
        positives = relevant.sum(0)
        chance = expected_average_precision(positives[positives > 0], len(scores)).mean().item()
        expected = {"top-1": relevant.double().mean().item(), mean: chance}
    else:
        labels = torch.tensor([own for (own,) in data.labels])
        ks = [k for k in (1, 3, 5) if k <= classes]
        mean, values = "class mean", top_k_hits(scores, labels, ks)
        hits = values["top-1"]

        def by_class(drawn: torch.Tensor) -> torch.Tensor:
            return class_accuracy(hits[drawn], labels[drawn], classes)

        expected = {f"top-{k}": k / classes for k in ks} | {mean: 1 / classes}

    def class_mean(drawn: torch.Tensor) -> dict[str, float]:
        return {mean: by_class(drawn).nanmean().item()}

    everything = torch.arange(len(scores))
    found = {name: rows.mean().item() for name, rows in values.items()} | class_mean(everything)
    intervals = bootstrap_means(values, resamples=resamples, seed=seed)
    intervals |= bootstrap_statistic(class_mean, len(scores), resamples=resamples, seed=seed, progress=progress)
    return Measured({CHANCE: expected, MODEL: found}, intervals, by_class(everything))


def breakdowns(scores: torch.Tensor, data: LabelledSet, by_class: torch.Tensor) -> list[Breakdown]:
    """Return the classes by what [`measure`] found of them, and of single classes those that are confused most."""
    words, counts = class_words(data), Counter(index for own in data.labels for index in own)
    rows = [
        (words[index], value, counted(counts[index], "items"))
        for index, value in enumerate(by_class.tolist())
        if not math.isnan(value)
    ]
    rows.sort(key=lambda row: -row[1])
    if data.several:
        return [Breakdown("Average precision by class", rows)]
    pairs = Counter(
        (own, found) for (own,), found in zip(data.labels, scores.argmax(1).tolist(), strict=True) if own != found
    )
    confused = [
        (f"{words[own]} → {words[found]}", number / counts[own], f"{number:,} of {counted(counts[own], 'items')}")
        for (own, found), number in pairs.most_common(CONFUSED)
    ]
    return [Breakdown("Accuracy by class", rows), Breakdown("Taken for another class, most often first", confused)]


def class_words(data: LabelledSet) -> list[str]:
    """Return what a reader calls the classes: their first names, and where two have the same their own ones too."""
    times = Counter(words[0] for words in data.words)
    return [
        words[0] if times[words[0]] == 1 else f"{words[0]} ({name})"
        for name, words in zip(data.classes, data.words, strict=True)
    ]


def cases(scores: torch.Tensor, data: LabelledSet) -> tuple[list[Case], list[Case]]:
    """Return the items that are most clearly right and most clearly wrong, of each class one at most.

    How clearly is the margin between the best of an item's classes and the best of the others.
    """
    relevant = data.relevant
    own = scores.masked_fill(~relevant, -math.inf).amax(1)
    margins = own - scores.masked_fill(relevant, -math.inf).amax(1)
    order = margins.argsort(stable=True).tolist()
    right = _one_a_class([row for row in reversed(order) if 0 < margins[row] < math.inf], data)
    wrong = _one_a_class([row for row in order if -math.inf < margins[row] < 0], data)
    items = data.items.pick({*right, *wrong})
    words = class_words(data)

    def case(row: int) -> Case:
        item = items[row]
        cosines, found = scores[row].topk(min(FOUND, scores.shape[1]))
        return Case(
            query=Shown(data.items.modality, item.value, item.key, ", ".join(words[i] for i in data.labels[row])),
            score=margins[row].item(),
            found=[
                Shown("text", words[index], data.classes[index], score=cosine, right=index in data.labels[row])
                for cosine, index in zip(cosines.tolist(), found.tolist(), strict=True)
            ],
            note=f"its class is {'ahead of' if margins[row] > 0 else 'behind'} the best other one by that cosine",
        )

    return [case(row) for row in right], [case(row) for row in wrong]


def _one_a_class(rows: Sequence[int], data: LabelledSet) -> list[int]:
    """Return the first rows, as many as a page shows, that have different classes."""
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(data.labels[row][0], row)
    return list(islice(first.values(), CASES))


def notes(data: LabelledSet, by_class: torch.Tensor) -> list[str]:
    """Return what a reader of the numbers must know of a set."""
    found = []
    if empty := int(by_class.isnan().sum()):
        found.append(f"Left out of the mean: {counted(empty, 'classes')} without an item here, of {len(by_class):,}.")
    times = Counter(words[0] for words in data.words)
    if same := [word for word, count in times.items() if count > 1]:
        found.append(f"Classes of one name cannot be told apart: {', '.join(same)}.")
    return found
