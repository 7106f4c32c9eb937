"""`cmcr evaluate localization` and `cmcr evaluate recognition`: where in a picture a sound comes from, and whether."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import add_shared_options, evaluated_model, finish, run_settings

if TYPE_CHECKING:
    from .embedding import EvaluatedModel
    from .localization import Localizer, Measured
    from .localization_data import SoundingPictures
    from .result import Case

# Best and worst pairs on the page, as many of each.
CASES = 8
NAMES = {
    "vgg-ss": "VGG-SS",
    "flickr-soundnet": "Flickr-SoundNet",
    "music": "MUSIC-Solo",
    "extended-vgg-ss": "Extended VGG-SS",
    "extended-flickr-soundnet": "Extended Flickr-SoundNet",
}
LICENCES = dict.fromkeys(("flickr-soundnet", "extended-flickr-soundnet"), "for research only, as its page says")
GRID_NOTE = "Proposals are a grid of 111 boxes, whatever is in the picture; those of an object detector fit better."
DENSE_NOTE = "Half of every picture is located, as in the literature, however small what sounds is."
_ALL_THRESHOLDS = (
    "AP and max-F1 are over all thresholds. SLAVC's code takes about two hundred of them for AP and ten for F1, so "
    "published numbers are approximations."
)
NOTES = {
    "music": "The boxes are read as x, y, width and height; AVGN, whose code reads them as corners, published them. "
    "A list of the 489 pairs that the C-MCR paper takes was not to be found. So its numbers are not comparable.",
    "extended-vgg-ss": _ALL_THRESHOLDS,
    "extended-flickr-soundnet": _ALL_THRESHOLDS,
}
# Models trained on pairs of pictures and sounds: name, metrics, source, and of how many pairs.
PUBLISHED: dict[str, tuple[str, dict[str, dict[str, float]], str, dict[str, list[int]]]] = {
    "vgg-ss": (
        "EZ-VSL, trained on 144k pairs",
        {"localization": {"cIoU@0.5": 0.3885, "AUC": 0.3954}},
        "github.com/stoneMo/EZ-VSL",
        {"pairs": [5158]},
    ),
    "flickr-soundnet": (
        "EZ-VSL, trained on 144k pairs",
        {"localization": {"cIoU@0.5": 0.8394, "AUC": 0.6360}},
        "github.com/stoneMo/EZ-VSL",
        {"pairs": [250]},
    ),
    "extended-vgg-ss": (
        "SLAVC, trained on 144k pairs",
        {"located recognition": {"AP": 0.3295, "max-F1": 0.4000}, "localization": {"cIoU@0.5": 0.3779}},
        "github.com/stoneMo/SLAVC",
        {"pairs": [10_316]},
    ),
    "extended-flickr-soundnet": (
        "SLAVC, trained on 144k pairs",
        {"located recognition": {"AP": 0.5163, "max-F1": 0.5910}, "localization": {"cIoU@0.5": 0.8360}},
        "github.com/stoneMo/SLAVC",
        {"pairs": [500]},
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
        choices=("region", "picture"),
        default="region",
        help="what is matched with the sound: its nearest region or patch, which a small source does not escape, or "
        "the picture as a whole (default: %(default)s)",
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


def _localizer(arguments: argparse.Namespace, model: EvaluatedModel, data: SoundingPictures) -> Localizer:
    from .localization import Localizer
    from .proposals import Detector

    detector = None if arguments.detector is None else Detector(arguments.detector, str(model.model.device))
    return Localizer(model, data, arguments.method, detector, arguments.threshold)


def _localization(arguments: argparse.Namespace) -> None:
    from .localization import measure_localization

    data = _opened(arguments)
    with evaluated_model(arguments, "image", "audio") as model:
        localizer = _localizer(arguments, model, data)
        data = localizer.data
        measured = measure_localization(localizer, data, resamples=arguments.bootstrap, seed=arguments.seed)
        title = f"audio-visual source localisation on {NAMES[arguments.layout]}"
        _finish(arguments, title, model, localizer, data, measured)


def _recognition(arguments: argparse.Namespace) -> None:
    from .recognition import measure_recognition, picture_matches

    data = _opened(arguments)
    with evaluated_model(arguments, "image", "audio") as model:
        localizer = _localizer(arguments, model, data)
        data = localizer.data
        matches = picture_matches(model, localizer, data) if arguments.confidence == "picture" else None
        measured = measure_recognition(localizer, data, matches, resamples=arguments.bootstrap, seed=arguments.seed)
        title = f"counterfactual audio-image recognition on {NAMES[arguments.layout]}"
        _finish(arguments, title, model, localizer, data, measured, confidence_of=arguments.confidence)


def _finish(
    arguments: argparse.Namespace,
    title: str,
    model: EvaluatedModel,
    localizer: Localizer,
    data: SoundingPictures,
    measured: Measured,
    **settings: Any,
) -> None:
    from .result import EvaluationResult, Published

    layout, notes = arguments.layout, []
    if arguments.method == "dense":
        settings["threshold"] = arguments.threshold
        notes += [DENSE_NOTE] if arguments.threshold == "half" else []
    else:
        settings["detector"] = localizer.detector
        notes += [GRID_NOTE] if localizer.detector is None else []
    notes += [NOTES[layout]] if layout in NOTES else []
    notes.append("In the pictures, the boxes of the data set are green, and that of the answer is red.")
    best, worst = _cases(localizer, data, measured)
    result = EvaluationResult(
        task=arguments.task,
        title=title,
        data={"name": NAMES[layout], "licence": LICENCES.get(layout), **data.record()},
        model=model.record(),
        settings=run_settings(arguments, "videos", layout=layout, method=arguments.method, **settings),
        metrics=measured.metrics,
        intervals=measured.intervals,
        published=[Published(*PUBLISHED[layout])] if layout in PUBLISHED else [],
        best=best,
        worst=worst,
        notes=notes,
    )
    finish(arguments, result)


def _cases(localizer: Localizer, data: SoundingPictures, measured: Measured) -> tuple[list[Case], list[Case]]:
    """Return the pairs of the largest and of the smallest values, the most extreme first, each drawn."""
    import numpy as np

    from .localization import draw_located
    from .result import Case, Shown, first_of_classes

    def case(row: int) -> Case:
        pair = data.pairs[row]
        drawn = draw_located(data.folder / pair.image, pair, localizer.locate(pair))
        shown = Shown("audio", data.folder / pair.audio, pair.key, pair.label)
        return Case(shown, float(measured.values[row]), overlay=drawn, note=measured.remarks[row])

    order = np.argsort(measured.values, kind="stable").tolist()
    half = len(order) // 2
    best, worst = (
        first_of_classes(rows[:half], lambda row: data.pairs[row].label, CASES) for rows in (order[::-1], order)
    )
    return [case(row) for row in best], [case(row) for row in worst]
