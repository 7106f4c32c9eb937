"""`cmcr evaluate retrieval`: any modality from any other that a model connects."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .commands import add_shared_options, evaluated_model, finish, run_settings

if TYPE_CHECKING:
    from ..modeling.configuration_cmcr import CMCRConfig
    from ..training.data import Items
    from ..training.store import EmbeddingStore
    from .pairs import PairedSet

LAYOUTS = ("pairs", "ave", "flickr-soundnet", "vgg-ss", "audiocaps", "clotho", "coco")
# The layouts that an option goes with, of those that do not go with all.
_LAYOUTS_OF = {
    "columns": ("pairs",),
    "files": ("pairs",),
    "config": ("pairs",),
    "split": ("pairs", "audiocaps", "clotho", "coco"),
    "list": ("flickr-soundnet", "vgg-ss"),
}
# Of those that have several, the split that published numbers are of.
_PROTOCOL = {"audiocaps": "test", "clotho": "evaluation", "coco": "test"}
_DESCRIPTION = """\
Rank the items of one modality for every item of another, in both directions: R@1, R@5, R@10 and their mean, mAP and
the median rank, by class too where items have classes. Beside the model stand chance, the sources alone, and with
--bank what connects them without training."""
_EPILOG = """data:
  pairs            a table (.csv, .tsv, .jsonl, .parquet) or a data set (folder or Hub id), and its columns:
                   --columns image=file text=caption_1 text=caption_2 class=label; of two of image, audio, text and
                   point_cloud. Several captions: rows that repeat the file, several columns, or a list in a cell.
                   Where a class is empty, the items are measured as pairs alone
  ave              Annotations.txt, frames/VIDEOID.jpg, audio/VIDEOID.wav     github.com/YapengTian/AVE-ECCV18
  flickr-soundnet  flickr_test.csv or --list, frames/NAME.jpg, audio/NAME.wav
  vgg-ss           vggss.json or --list, frames/NAME.jpg, audio/NAME.wav
                                     both github.com/hche11/Localizing-Visual-Sounds-the-Hard-Way
  audiocaps        test.csv, audio/YOUTUBEID.wav                              github.com/cdjkim/audiocaps
  clotho           clotho_captions_evaluation.csv, evaluation/*.wav           zenodo.org/records/4783391
  coco             dataset_coco.json or annotations/captions_val20??.json, val2014, val2017   cocodataset.org
A folder that lacks something is told what it has to hold and where to get it. Files that are not there or cannot be
read are left out and listed in result.json.

examples:
  cmcr evaluate retrieval --model runs/mine/model --data pairs.csv --columns image=photo audio=clip --bank texts.csv
  cmcr evaluate retrieval --model org/cmcr-clip-clap --data AVE_Dataset --layout ave
  cmcr evaluate retrieval --model runs/demo/model --images photos --audio sounds --label stem"""


def add_retrieval(tasks: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = tasks.add_parser(
        "retrieval",
        help="retrieval between two modalities: pairs of your own, AVE, VGG-SS, AudioCaps, Clotho, COCO",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shared_options(parser, "retrieval")
    parser.add_argument("--data", help="table, data set or folder")
    parser.add_argument("--layout", choices=LAYOUTS, help="of the data (default: pairs)")
    parser.add_argument("--columns", nargs="+", metavar="KIND=COLUMN", help="of pairs, see below")
    parser.add_argument("--files", metavar="DIR", help="folder of the files of a table (default: the table's own)")
    parser.add_argument("--config", help="of a data set")
    parser.add_argument("--split", help="of a data set (default: train) or benchmark (default: test or evaluation)")
    parser.add_argument("--list", type=Path, metavar="FILE", help="names of the pairs, in its first column")
    parser.add_argument("--images", type=Path, metavar="DIR", help="instead of --data: images, and")
    parser.add_argument("--audio", type=Path, metavar="DIR", help="audio files, of which all of a class are right")
    parser.add_argument(
        "--label",
        choices=("parent", "stem"),
        help="class of a file of --images and --audio: its folder's name or its own (default: parent)",
    )
    parser.add_argument(
        "--bank",
        nargs="+",
        metavar="DATA",
        help="texts (a .txt, .csv, ...: of a table, the first column, or --bank-column), or a folder of images: what "
        "both sources embed, for the baselines that connect them without training; or what `cmcr embed` or an "
        "evaluation made of it, clip=STORE clap=STORE",
    )
    parser.add_argument("--bank-column", metavar="COLUMN", help="of the bank")
    parser.add_argument(
        "--text-space",
        choices=("clip", "clap", "ulip"),
        help="source that embeds the texts (default: the model's own choice, CLIP where it has one)",
    )
    parser.set_defaults(run=_retrieval)


def _retrieval(arguments: argparse.Namespace) -> None:
    from ..training.data import Items
    from .pair_ranking import (
        PUBLISHED,
        build_scorers,
        compare_with_bridges,
        measure_rankings,
        ranking_cases,
        source_spaces,
    )
    from .result import MODEL, EvaluationResult

    data = _paired_set(arguments)
    if arguments.text_space is not None and "text" not in data.modalities:
        raise ValueError(
            f"--text-space says which source embeds the texts of the data, which has {' and '.join(data.modalities)} "
            "items. Leave it out."
        )
    if arguments.bank is None and arguments.bank_column is not None:
        raise ValueError("--bank-column goes with --bank, which is not given. Name the bank too, or leave it out.")
    bank = None if arguments.bank is None else _bank(arguments)
    modalities = set(data.modalities)
    if bank is not None:
        # Of stores, to tell whether the towers of the model made them, and for the names of the classes.
        modalities |= {bank.modality} if isinstance(bank, Items) else {store.modality for store in bank.values()}

    def check(config: CMCRConfig) -> None:
        source_spaces(config, data, bank, arguments.text_space)

    with evaluated_model(arguments, *sorted(modalities), check=check) as model:
        methods = build_scorers(model, data, bank=bank, text_space=arguments.text_space)
        data = methods.data
        ranked = measure_rankings(
            data,
            methods.scorers,
            resamples=arguments.bootstrap,
            seed=arguments.seed,
            progress=model.progress,
        )
        best, worst = ranking_cases(data, methods.scorers[MODEL][0], ranked.precision)
        kind = "-".join("3D" if name == "point_cloud" else name for name in data.modalities)
        described: dict[str, str | int] = {}
        if isinstance(bank, Items):
            described = {"items": len(bank), "fingerprint": bank.fingerprint}
        elif bank is not None:
            described = {f"{space} sha256": store.digest for space, store in bank.items()}
        finish(
            arguments,
            EvaluationResult(
                task="retrieval",
                title=f"{kind} retrieval {'by class' if data.pairs is None else f'on {data.name}'}",
                data={**data.record(), "part": _part(arguments)},
                model=model.record(),
                settings=run_settings(
                    arguments,
                    "queries, texts of one item together, the gallery as it is"
                    + ("" if data.pairs is None else "; of the mean, over items that hang together by pairs"),
                    text_space=dict(zip(data.modalities, methods.spaces, strict=True)).get("text"),
                    bank=described,
                    **methods.temperatures,
                ),
                metrics=ranked.metrics,
                intervals=ranked.intervals,
                published=PUBLISHED.get(arguments.layout, ()),
                best=best,
                worst=worst,
                notes=[
                    *methods.notes,
                    *data.notes(),
                    *ranked.notes,
                    *(compare_with_bridges(ranked) if methods.comparable else []),
                ],
            ),
        )


def _part(arguments: argparse.Namespace) -> str | None:
    """Say which part of a benchmark the data is, where that is not the one that published numbers are of."""
    from .pairs import KARPATHY

    layout = arguments.layout
    # The numbers of Flickr-SoundNet are of a list that only --list can name.
    if arguments.list is not None and layout != "flickr-soundnet":
        return f"the list {arguments.list.name}"
    if layout == "coco" and not (Path(arguments.data) / KARPATHY).is_file():
        return "the official captions, not a split of Karpathy"
    if layout in _PROTOCOL and arguments.split not in (None, _PROTOCOL[layout]):
        return f"the split {arguments.split}"
    return None


def _bank(arguments: argparse.Namespace) -> Items | dict[str, EmbeddingStore]:
    from ..training.data import Items, is_table
    from ..training.embed_command import data_entry
    from ..training.places import is_address
    from ..training.store import EmbeddingStore

    named = [part.partition("=") for part in arguments.bank]
    if all(equals and space in ("clip", "clap", "ulip") for space, equals, _ in named):
        if arguments.bank_column is not None:
            raise ValueError("--bank-column goes with a table or a data set, got stores. Leave it out.")
        return {space: EmbeddingStore.open(folder) for space, _, folder in named}
    if len(named) > 1:
        raise ValueError(f"Expected one bank, or SPACE=STORE twice, got {' '.join(arguments.bank)}.")
    (bank,) = arguments.bank
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", bank) is not None and not is_table(bank)
    if not Path(bank).exists() and not is_address(bank) and not is_hub_id:
        raise ValueError(
            f"There is no file or folder {bank!r}. Name the bank: texts in a .txt, .csv, .tsv, .json, .jsonl or "
            ".parquet file, a folder of images, a Hub data set OWNER/NAME, or stores, as clip=STORE clap=STORE."
        )
    modality = "image" if Path(bank).is_dir() and arguments.bank_column is None else "text"
    columns = None if arguments.bank_column is None else [arguments.bank_column]
    return Items([data_entry(bank, modality, column=columns)], modality, Path())


def _paired_set(arguments: argparse.Namespace) -> PairedSet:
    """Open the data of a command; ValueError says what it lacks."""
    from ..training.data import is_table
    from .pairs import load_audiocaps, load_ave, load_clotho, load_coco, load_folders, load_pairs, load_sounding

    layout, limit = arguments.layout, arguments.limit
    if (arguments.images is None) != (arguments.audio is None) or (arguments.images is None) == (
        arguments.data is None
    ):
        raise ValueError("Expected --data, or --images and --audio. See cmcr evaluate retrieval --help.")
    if arguments.images is not None:
        for option in ("layout", *_LAYOUTS_OF):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option} goes with --data, got --images and --audio. Leave it out.")
        return load_folders(arguments.images, arguments.audio, arguments.label or "parent", limit)
    if arguments.label is not None:
        raise ValueError("--label goes with --images and --audio, got --data. Leave it out.")
    layout = layout or "pairs"
    for option, layouts in _LAYOUTS_OF.items():
        if getattr(arguments, option) is not None and layout not in layouts:
            raise ValueError(f"--{option} goes with --layout {' and '.join(layouts)}, got {layout}. Leave it out.")
    folder = Path(arguments.data)
    split = {} if arguments.split is None else {"split": arguments.split}
    if layout == "ave":
        return load_ave(folder, limit=limit)
    if layout == "flickr-soundnet":
        return load_sounding(
            "Flickr-SoundNet", folder, ["flickr_test.csv"], "Flickr-SoundNet", chosen=arguments.list, limit=limit
        )
    if layout == "vgg-ss":
        return load_sounding(
            "VGG-SS", folder, ["vggss.json", "vggss_test.csv"], "VGGSound", chosen=arguments.list, limit=limit
        )
    if layout == "audiocaps":
        return load_audiocaps(folder, limit=limit, **split)
    if layout == "clotho":
        return load_clotho(folder, limit=limit, **split)
    if layout == "coco":
        return load_coco(folder, limit=limit, **split)
    given = "a table" if is_table(arguments.data) else "a data set"
    for option, own in (("files", "a table"), ("config", "a data set"), ("split", "a data set")):
        if getattr(arguments, option) is not None and own != given:
            raise ValueError(f"--{option} goes with {own}, and {arguments.data} is {given}. Leave it out.")
    columns = []
    for column in arguments.columns or []:
        kind, equals, name = column.partition("=")
        if not equals:
            raise ValueError(f"Expected --columns KIND=COLUMN, got {column!r}. Write, for example, image={column}.")
        columns.append((kind, name))
    return load_pairs(arguments.data, columns, files=arguments.files, config=arguments.config, limit=limit, **split)
