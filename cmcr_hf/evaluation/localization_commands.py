"""`cmcr evaluate localization` and `cmcr evaluate recognition`: where in a picture a sound comes from, and whether."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import add_shared_options, evaluated_model, finish, run_settings

if TYPE_CHECKING:
    import numpy as np

    from .embedding import EvaluatedModel
    from .localization import Localizer
    from .localization_data import SoundingPictures
    from .result import Case, Published

# Best and worst pairs on the page, as many of each.
CASES = 8
LOCATED, RECOGNISED, BOTH = "localization", "recognition", "located recognition"
NAMES = {
    "vgg-ss": "VGG-SS",
    "flickr-soundnet": "Flickr-SoundNet",
    "music": "MUSIC-Solo",
    "extended-vgg-ss": "Extended VGG-SS",
    "extended-flickr-soundnet": "Extended Flickr-SoundNet",
}
GRID_NOTE = "Proposals are a grid of 111 boxes, whatever is in the picture; those of an object detector fit better."
DENSE_NOTE = "Half of every picture is located, as in the literature, however small what sounds is."
MUSIC_NOTE = (
    "The boxes are read as x, y, width and height; AVGN, whose code reads them as corners, published them. Which 489 "
    "pairs the C-MCR paper takes is not published. So numbers of others are not comparable."
)
RECOGNITION_NOTE = (
    "AP and max-F1 are over all thresholds. SLAVC's code takes about two hundred of them for AP and ten for F1, so "
    "published numbers are approximations."
)
# Models trained on pairs of pictures and sounds: name, metrics, source.
PUBLISHED: dict[str, tuple[str, dict[str, dict[str, float]], str]] = {
    "vgg-ss": (
        "EZ-VSL, trained on 144k pairs",
        {LOCATED: {"cIoU@0.5": 0.3885, "AUC": 0.3954}},
        "github.com/stoneMo/EZ-VSL",
    ),
    "flickr-soundnet": (
        "EZ-VSL, trained on 144k pairs",
        {LOCATED: {"cIoU@0.5": 0.8394, "AUC": 0.6360}},
        "github.com/stoneMo/EZ-VSL",
    ),
    "extended-vgg-ss": (
        "SLAVC, trained on 144k pairs",
        {BOTH: {"AP": 0.3295, "max-F1": 0.4000}, LOCATED: {"cIoU@0.5": 0.3779}},
        "github.com/stoneMo/SLAVC",
    ),
    "extended-flickr-soundnet": (
        "SLAVC, trained on 144k pairs",
        {BOTH: {"AP": 0.5163, "max-F1": 0.5910}, LOCATED: {"cIoU@0.5": 0.8360}},
        "github.com/stoneMo/SLAVC",
    ),
}


def add_localization(tasks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = tasks.add_parser(
        "localization",
        help="where in a picture its sound comes from: VGG-SS, Flickr-SoundNet, MUSIC-Solo",
        description="Locate sounds in pictures without any training: the region whose embedding is nearest to that of "
        "the sound (proposals), or the patches that are (dense). cIoU@0.5 and AUC against the boxes of annotators.",
        epilog="Example: cmcr evaluate localization --model org/cmcr-clip-clap --data VGG-SS --layout vgg-ss",
    )
    add_shared_options(parser, "localization")
    _add_options(parser, ("vgg-ss", "flickr-soundnet", "music"))
    parser.set_defaults(run=_localization)


def add_recognition(tasks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = tasks.add_parser(
        "recognition",
        help="whether a sound comes from anything in a picture: Extended VGG-SS and Flickr-SoundNet",
        description="Tell pairs of picture and sound in which something sounds from those in which nothing does, by "
        "how well they match: AP and max-F1, of the match alone, and with a pair counting only where its source was "
        "located too, at a cIoU of 0.5.",
        epilog="Example: cmcr evaluate recognition --model org/cmcr-clip-clap --data Extended-VGG-SS --layout "
        "extended-vgg-ss",
    )
    add_shared_options(parser, "recognition")
    _add_options(parser, ("extended-vgg-ss", "extended-flickr-soundnet"))
    parser.add_argument(
        "--confidence",
        choices=("picture", "region"),
        default="picture",
        help="what is matched with the sound: the whole picture, or its nearest region or patch (default: "
        "%(default)s)",
    )
    parser.set_defaults(run=_recognition)


def _add_options(parser: argparse.ArgumentParser, layouts: Sequence[str]) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set, with frames and audio")
    parser.add_argument("--layout", choices=layouts, required=True, help="which data set it is")
    parser.add_argument(
        "--method",
        choices=("proposals", "dense"),
        default="proposals",
        help="regions that are embedded one by one, on a grid or of a detector, or a map of the patches of CLIP or "
        "SigLIP (default: %(default)s)",
    )
    parser.add_argument(
        "--detector", metavar="ID", help="folder or Hub id of an object detector of transformers, for the proposals"
    )
    parser.add_argument(
        "--threshold",
        choices=("half", "middle"),
        default="half",
        help="what of a dense map counts: the hotter half of the picture, which is what published numbers are made "
        "with and knows nothing of the data, or what is nearer to the hottest than to the coldest patch (default: "
        "%(default)s)",
    )


def _opened(arguments: argparse.Namespace) -> SoundingPictures:
    from . import localization_data as data

    if arguments.detector is not None and arguments.method != "proposals":
        raise ValueError("A detector finds proposals, and --method dense has none. Leave --detector out.")
    load = {
        "vgg-ss": data.load_vgg_ss,
        "flickr-soundnet": data.load_flickr_soundnet,
        "music": data.load_music,
        "extended-vgg-ss": data.load_extended_vgg_ss,
        "extended-flickr-soundnet": data.load_extended_flickr_soundnet,
    }[arguments.layout]
    return load(arguments.data).first(arguments.limit)


def _localizer(
    arguments: argparse.Namespace, model: EvaluatedModel, data: SoundingPictures
) -> tuple[Localizer, dict[str, Any]]:
    """Return what locates the sounds, and the settings that it depends on."""
    from .localization import Localizer
    from .proposals import Detector

    detector = None if arguments.detector is None else Detector(arguments.detector, str(model.model.device))
    settings = {"layout": arguments.layout, "method": arguments.method}
    if arguments.method == "dense":
        settings["threshold"] = arguments.threshold
    else:
        settings["proposals"] = "grid" if detector is None else detector.record
    return Localizer(model, data, arguments.method, detector, arguments.threshold), settings


def _localization(arguments: argparse.Namespace) -> None:
    import torch

    from .bootstrap import bootstrap_means
    from .boxes import iou_values
    from .localization import floor_values, locate_pairs
    from .result import MODEL, EvaluationResult

    data = _opened(arguments)
    with evaluated_model(arguments, "image", "audio") as model:
        localizer, settings = _localizer(arguments, model, data)
        ious, scores = locate_pairs(localizer, data, progress=model.progress)
        values = {**floor_values(localizer, data), MODEL: iou_values(ious)}
        intervals = {
            method: bootstrap_means(
                {name: torch.from_numpy(row) for name, row in rows.items()},
                resamples=arguments.bootstrap,
                seed=arguments.seed,
                groups=data.videos(),
            )
            for method, rows in values.items()
        }
        notes = [f"cIoU {iou:.2f}, cosine {score:.2f}" for iou, score in zip(ious, scores, strict=True)]
        best, worst = _cases(localizer, data, ious, notes)
        finish(
            arguments,
            EvaluationResult(
                task="localization",
                title=f"audio-visual source localisation on {NAMES[arguments.layout]}",
                data=_data(arguments, data),
                model=model.record(),
                settings=run_settings(arguments, "videos", **settings),
                metrics={
                    method: {LOCATED: {name: float(row.mean()) for name, row in rows.items()}}
                    for method, rows in values.items()
                },
                intervals={method: {LOCATED: found} for method, found in intervals.items()},
                published=_published(arguments),
                best=best,
                worst=worst,
                notes=_notes(arguments),
            ),
        )


def _recognition(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from ..training.data import Items
    from .bootstrap import bootstrap_statistic
    from .boxes import LEVEL, iou_values
    from .localization import locate_pairs
    from .localization_data import SILENT
    from .recognition import best_threshold, recognition_metrics
    from .result import MODEL, EvaluationResult

    data = _opened(arguments)
    sounding = np.array([pair.label != SILENT for pair in data.pairs])
    with evaluated_model(arguments, "image", "audio") as model:
        localizer, settings = _localizer(arguments, model, data)
        ious, confidence = locate_pairs(localizer, data, progress=model.progress)
        if arguments.confidence == "picture":
            names = list(dict.fromkeys(pair.image for pair in data.pairs))
            pictures = dict(zip(names, model.embeds(Items.listed("image", names, data.folder)), strict=True))
            matches = [pictures[pair.image] @ localizer.sounds[pair.audio] for pair in data.pairs]
            confidence = torch.stack(matches).double().numpy()
        located = ious >= LEVEL

        def measured(rows: torch.Tensor, given: np.ndarray = confidence) -> dict[str, dict[str, float]]:
            drawn = rows.numpy()
            alone = recognition_metrics(given[drawn], sounding[drawn])
            return {RECOGNISED: alone, BOTH: recognition_metrics(given[drawn], sounding[drawn], located[drawn])}

        every = torch.arange(len(confidence))
        found = measured(every)
        flat = bootstrap_statistic(
            lambda rows: {
                f"{group}/{name}": value for group, values in measured(rows).items() for name, value in values.items()
            },
            data.videos(),
            resamples=arguments.bootstrap,
            seed=arguments.seed,
        )
        intervals: dict[str, dict[str, tuple[float, float]]] = {}
        for name, interval in flat.items():
            group, metric = name.split("/")
            intervals.setdefault(group, {})[metric] = interval
        means = {name: float(row.mean()) for name, row in iou_values(ious[sounding]).items()}
        threshold = best_threshold(confidence, sounding)
        margins = np.where(sounding, 1, -1) * (confidence - threshold)
        notes = [
            f"{'sounds' if sounds else 'nothing sounds'}, match {match:.2f} (accepted from {threshold:.2f})"
            + (f", cIoU {iou:.2f}" if sounds else "")
            for sounds, match, iou in zip(sounding, confidence, ious, strict=True)
        ]
        best, worst = _cases(localizer, data, margins, notes)
        finish(
            arguments,
            EvaluationResult(
                task="recognition",
                title=f"counterfactual audio-image recognition on {NAMES[arguments.layout]}",
                data=_data(arguments, data),
                model=model.record(),
                settings=run_settings(arguments, "videos", confidence_of=arguments.confidence, **settings),
                metrics={
                    "all accepted": measured(every, np.zeros(len(confidence))),
                    MODEL: {**found, LOCATED: means},
                },
                intervals={MODEL: intervals},
                published=_published(arguments),
                best=best,
                worst=worst,
                notes=[*_notes(arguments), RECOGNITION_NOTE],
            ),
        )


def _cases(
    localizer: Localizer, data: SoundingPictures, values: np.ndarray, notes: Sequence[str]
) -> tuple[list[Case], list[Case]]:
    """Return the pairs of the largest and of the smallest values, the most extreme first, each drawn."""
    import numpy as np

    from .localization import draw_located
    from .result import Case, Shown

    def case(row: int) -> Case:
        pair = data.pairs[row]
        drawn = draw_located(data.folder / pair.image, pair, localizer.locate(pair))
        shown = Shown("audio", data.folder / pair.audio, pair.key, pair.label)
        return Case(shown, float(values[row]), overlay=drawn, note=notes[row])

    order = np.argsort(values, kind="stable").tolist()
    count = min(CASES, len(order) // 2)
    return [case(row) for row in order[::-1][:count]], [case(row) for row in order[:count]]


def _data(arguments: argparse.Namespace, data: SoundingPictures) -> dict[str, Any]:
    licence = "for research only, as its page says" if "flickr" in arguments.layout else None
    return {"name": NAMES[arguments.layout], "licence": licence, **data.record()}


def _notes(arguments: argparse.Namespace) -> list[str]:
    notes = []
    if arguments.method == "dense" and arguments.threshold == "half":
        notes.append(DENSE_NOTE)
    if arguments.method == "proposals" and arguments.detector is None:
        notes.append(GRID_NOTE)
    return notes + ([MUSIC_NOTE] if arguments.layout == "music" else [])


def _published(arguments: argparse.Namespace) -> list[Published]:
    from .result import Published

    if arguments.limit is not None:
        return []
    found = PUBLISHED.get(arguments.layout)
    return [] if found is None else [Published(*found)]
