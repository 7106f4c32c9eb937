"""`cmcr evaluate classification`: what items are, told by prompts alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .commands import add_shared_options, evaluated_model, finish, run_settings

if TYPE_CHECKING:
    from .labelled import LabelledSet

LAYOUTS = ("esc-50", "audioset", "imagenet", "modelnet40", "folder", "table")
# The layouts that an option of `cmcr evaluate classification` goes with, of those that do not go with all.
_LAYOUTS_OF = {
    "fold": ("esc-50",),
    "names": ("imagenet", "folder", "table"),
    "modality": ("folder", "table"),
    "column": ("table",),
    "label": ("table",),
    "config": ("table",),
    "split": ("table",),
}


def add_classification(tasks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = tasks.add_parser(
        "classification",
        help="zero-shot classification of images, audio and point clouds",
        description="Compare items with the mean embedding of prompts for each class. Items of one class: top-1, "
        "top-3 and top-5 accuracy and the mean of the classes; of several (AudioSet): mAP.",
        epilog="Examples: cmcr evaluate classification --model runs/mine/model --data ESC-50-master --layout esc-50, "
        "cmcr evaluate classification --model runs/mine/model --data photos --layout folder --modality image "
        "--template 'a photo of a {}.'",
    )
    add_shared_options(parser, "classification")
    parser.add_argument(
        "--data", required=True, help="folder of the data set; for table a table file or a data set (folder or Hub id)"
    )
    parser.add_argument(
        "--layout",
        required=True,
        choices=LAYOUTS,
        help="of a published data set; or folder: CLASS/FILE; or table: columns of items and of classes. What a "
        "folder has to hold is said where it does not",
    )
    parser.add_argument("--modality", choices=("image", "audio", "point_cloud"), help="of a folder or a table")
    parser.add_argument("--column", help="of a table: the files or items (default: a file's first)")
    parser.add_argument("--label", metavar="COLUMN", help="of a table: the classes")
    parser.add_argument("--config", help="of a data set")
    parser.add_argument("--split", help="of a data set (default: train)")
    parser.add_argument(
        "--fold",
        type=int,
        action="append",
        choices=range(1, 6),
        help="of ESC-50; give it several times for several (default: all five, as published zero-shot results are)",
    )
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="what classes are called: lines CLASS NAME, JSON {CLASS: NAME or [NAME, ...]}, or a JSON list of names "
        "in the order of the classes (default: their folder or label; for ImageNet LOC_synset_mapping.txt)",
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--template",
        action="append",
        help="prompt with {} for the name of a class; give it several times for an ensemble (default: CLIP's seven "
        "for images, 'This is a sound of {}.' for audio, 64 for point clouds)",
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="templates: one a line, or a JSON list")
    parser.add_argument(
        "--text-space",
        choices=("clip", "clap", "ulip"),
        help="source that embeds the prompts (default: the model's own choice, CLIP where it has one, so that audio "
        "and point clouds are named across the connection; their own source is the native comparison)",
    )
    parser.set_defaults(run=_classification)


def _classification(arguments: argparse.Namespace) -> None:
    from .result import MODEL, EvaluationResult
    from .zero_shot import (
        CLASSIFICATION,
        PUBLISHED,
        TEMPLATE_NOTES,
        TEMPLATES,
        breakdowns,
        cases,
        measure,
        notes,
        read_templates,
        zero_shot_scores,
    )

    data = _labelled_set(arguments)
    modality = data.items.modality
    own = read_templates(arguments.prompts) if arguments.prompts else arguments.template
    templates = own or TEMPLATES[modality]
    remark = None if own else TEMPLATE_NOTES[modality]
    with evaluated_model(arguments, "text", modality) as model:
        text_space = model.model.config.space_of("text", arguments.text_space)
        data, scores = zero_shot_scores(model, data, templates, text_space=text_space)
        found = measure(scores, data, resamples=arguments.bootstrap, seed=arguments.seed, progress=model.progress)
        best, worst = cases(scores, data)
        finish(
            arguments,
            EvaluationResult(
                task="classification",
                title=f"zero-shot classification of {data.name}",
                data=data.record(),
                model=model.record(),
                settings=run_settings(
                    arguments,
                    "items",
                    templates=list(templates),
                    names=[" / ".join(words) for words in data.words],
                    text_space=text_space,
                ),
                metrics={method: {CLASSIFICATION: values} for method, values in found.metrics.items()},
                intervals={MODEL: {CLASSIFICATION: found.intervals}},
                published=PUBLISHED.get(arguments.layout, ()),
                best=best,
                worst=worst,
                breakdowns=breakdowns(scores, data, found.by_class),
                notes=[*notes(data, found.by_class), *([remark] if remark else [])],
            ),
        )


def _labelled_set(arguments: argparse.Namespace) -> LabelledSet:
    """Open the data of a command; ValueError says what it lacks."""
    from ..training.embed_command import data_entry
    from ..training.recipe import DataSpec
    from .labelled import items_and_whole, label_items, load_audioset, load_esc50, load_imagenet, read_words
    from .modelnet40 import load_modelnet40
    from .pairs import rooted

    layout, limit = arguments.layout, arguments.limit
    for option, layouts in _LAYOUTS_OF.items():
        if getattr(arguments, option) is not None and layout not in layouts:
            raise ValueError(f"--{option} goes with --layout {' and '.join(layouts)}, got {layout}. Leave it out.")
    words = read_words(arguments.names) if arguments.names else None
    if layout == "esc-50":
        return load_esc50(Path(arguments.data), arguments.fold, limit=limit)
    if layout == "audioset":
        return load_audioset(Path(arguments.data), limit=limit)
    if layout == "imagenet":
        return load_imagenet(Path(arguments.data), words, limit=limit)
    if layout == "modelnet40":
        return load_modelnet40(arguments.data, limit=limit)
    if arguments.modality is None:
        raise ValueError(f"Expected --modality with --layout {layout}: image, audio or point_cloud.")
    if layout == "folder":
        spec = DataSpec(folder=arguments.data, label="parent", limit=limit)
    else:
        if arguments.label is None:
            raise ValueError("Expected --label COLUMN with --layout table, the column of the classes.")
        given = {name: value for name in ("config", "split") if (value := getattr(arguments, name)) is not None}
        columns = None if arguments.column is None else [arguments.column]
        options = {"column": columns, "label": arguments.label, "limit": limit, **given}
        spec = data_entry(arguments.data, arguments.modality, **options)
    root = Path()
    if spec.dataset is not None:
        root, name = rooted(spec.dataset)
        spec = replace(spec, dataset=name)
    return label_items(Path(arguments.data).name, *items_and_whole(spec, arguments.modality, root), words)
