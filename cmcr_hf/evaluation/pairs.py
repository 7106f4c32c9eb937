"""Pairs to retrieve from each other: tables and data sets of one's own, and benchmarks as they are published.

No benchmark comes with this package, and none is downloaded. Where a row names a file, equal names are one item, so
that an image with five captions in five rows is one image. A caption is an item of its own row, also where its words
are those of another: as in the published protocols, only its own picture is right, and the two rank as ties. Rows
without a name or a text on either side are passed over and counted, files that are not there passed over and named.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..training.data import SUFFIXES, Items, is_table, load_table
from ..training.places import is_address
from ..training.recipe import DataSpec
from .labelled import check_class_names
from .result import counted, left_out, shown

# What the items of a modality are called.
NOUNS = {"audio": "clips", "image": "images", "text": "texts", "point_cloud": "clouds"}
AVE = (
    "Annotations.txt of github.com/YapengTian/AVE-ECCV18 (lines Category&VideoID&Quality&StartTime&EndTime), and of "
    "the videos in its AVE.zip, which are not read themselves, frames/VIDEOID.jpg and audio/VIDEOID.wav: the frame in "
    "the middle (ffmpeg -ss 5 -i VIDEOID.mp4 -frames:v 1 frames/VIDEOID.jpg) and all of the sound (ffmpeg -i "
    "VIDEOID.mp4 -vn audio/VIDEOID.wav)"
)
SOUNDING = (
    "{lists} of github.com/hche11/Localizing-Visual-Sounds-the-Hard-Way (metadata), or --list FILE, whose first "
    "column has the names, and frames/NAME.jpg and audio/NAME.wav: the middle frame and the sound of the ten seconds "
    "of {of}"
)
AUDIOCAPS = (
    "{split}.csv of github.com/cdjkim/audiocaps (dataset; columns audiocap_id, youtube_id, start_time, caption), and "
    "in audio the ten seconds of AudioSet from start_time on, which are not part of AudioCaps: YOUTUBEID.wav, "
    "YOUTUBEID_START.wav, YYOUTUBEID.wav or AUDIOCAPID.wav, other formats of audio too"
)
CLOTHO = (
    "clotho_captions_{split}.csv and the folder {split} of clotho_audio_{split}.7z, both of "
    "zenodo.org/records/4783391 (Clotho 2.1; columns file_name, caption_1 to caption_5)"
)
KARPATHY = "dataset_coco.json"
COCO = (
    "dataset_coco.json of the Karpathy split (cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip) or "
    "annotations/captions_val2014.json or captions_val2017.json, and the folders of images it names (train2014, "
    "val2014, val2017), all of cocodataset.org/#download"
)


@dataclass
class PairedSet:
    """Items of two modalities and which of them belong together.

    Args:
        sides: the items, of two modalities.
        pairs: `(pairs, 2)` rows of both sides that belong together; every item is in one. None where items are right
            for each other by their classes alone.
        classes: of each side, `(items, classes)` bool, where items have classes, and their names. An item may have
            none, and is then in no measure by class.
        missing: what is not there: names of files, or of what should have one.
        unreadable: items that were left out, since they cannot be read.
        empty: rows without a name or a text on a side.
    """

    name: str
    sides: tuple[Items, Items]
    pairs: torch.Tensor | None
    classes: tuple[torch.Tensor, torch.Tensor] | None = None
    class_names: Sequence[str] = ()
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    empty: int = 0
    licence: str | None = None

    @property
    def modalities(self) -> tuple[str, str]:
        """What the sides are."""
        return self.sides[0].modality, self.sides[1].modality

    @property
    def sizes(self) -> tuple[int, int]:
        """How many items the sides have; of a data set that is streamed, only the pairs tell."""
        if self.classes is not None:
            return len(self.classes[0]), len(self.classes[1])
        if self.pairs is None:
            raise ValueError("Got neither pairs nor classes, expected one of them; pass pairs=.")
        first, second = (self.pairs.amax(0) + 1).tolist()
        return first, second

    def gold(self, side: int) -> torch.Tensor:
        """Return the rows of the other side that belong to each of this one's, `(items, most)`, filled up with -1."""
        if self.pairs is None:
            raise ValueError(f"{self.name} has no pairs, only classes. Use right().")
        pairs = self.pairs[self.pairs[:, side].argsort(stable=True)]
        counts = torch.bincount(pairs[:, side])
        place = torch.arange(len(pairs)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        gold = torch.full((len(counts), int(counts.max())), -1)
        gold[pairs[:, side], place] = pairs[:, 1 - side]
        return gold

    def same_class(self, side: int, rows: slice) -> torch.Tensor:
        """Return whether rows of a side have a class in common with each of the other side's, bool `(rows, items)`."""
        if self.classes is None:
            raise ValueError(f"{self.name} has no classes, expected some; pass classes=.")
        return self.classes[side][rows].float() @ self.classes[1 - side].float().T > 0

    def classified(self, side: int) -> torch.Tensor:
        """Return the rows of a side that have a class which an item of the other side has too, `(rows,)`."""
        if self.classes is None:
            raise ValueError(f"{self.name} has no classes, expected some; pass classes=.")
        return (self.classes[side] & self.classes[1 - side].any(0)).any(1).nonzero()[:, 0]

    def units(self) -> list[torch.Tensor]:
        """Return of each side which items hang together by pairs, `(items,)` numbers from 0 on, the same on both.

        An image with its captions is one unit, and so is a pair whose items are in no other.
        """
        if self.pairs is None:
            raise ValueError(f"{self.name} has no pairs, only classes.")
        firsts, seconds = self.pairs.T
        unit = [torch.arange(self.sizes[0]), torch.zeros(self.sizes[1], dtype=torch.long)]
        while True:
            # Each item takes the least number of those that it is paired with.
            unit[1].scatter_reduce_(0, seconds, unit[0][firsts], "amin", include_self=False)
            least = unit[0].scatter_reduce(0, firsts, unit[1][seconds], "amin")
            if torch.equal(least, unit[0]):
                break
            unit[0] = least
        numbers = unit[0].unique()
        return [torch.searchsorted(numbers, own) for own in unit]

    def notes(self) -> list[str]:
        """Return what a reader of the measures by class must know, if anything."""
        if self.classes is None:
            return []
        lacking = [
            counted(size - len(self.classified(side)), NOUNS[self.modalities[side]])
            for side, size in enumerate(self.sizes)
            if size > len(self.classified(side))
        ]
        if not lacking:
            return []
        return [f"Measured by class without {' and '.join(lacking)}, which have no class that the other side has."]

    def right(self, side: int, row: int) -> set[int]:
        """Return the rows of the other side that are right for one of this one's, by pairs, else by class."""
        if self.pairs is None:
            return set(self.same_class(side, slice(row, row + 1))[0].nonzero()[:, 0].tolist())
        return set(self.pairs[self.pairs[:, side] == row, 1 - side].tolist())

    def readable(self, keys: Sequence[Collection[str]]) -> tuple[PairedSet, list[torch.Tensor]]:
        """Return the set without the items that have none of their side's keys, nor what belongs to those alone.

        With it comes where its items are among those that have one, `(items,)` of each side.

        Raises:
            ValueError: nothing is left.
        """
        named = [[item.key for item in side] for side in self.sides]
        there = [torch.tensor([key in own for key in side]) for side, own in zip(named, keys, strict=True)]
        pairs, classes, class_names = self.pairs, self.classes, self.class_names
        if pairs is not None:
            pairs = pairs[there[0][pairs[:, 0]] & there[1][pairs[:, 1]]]
            rows = [pairs[:, side].unique() for side in (0, 1)]
            pairs = torch.stack([torch.searchsorted(rows[side], pairs[:, side].contiguous()) for side in (0, 1)], 1)
        elif classes is not None:
            # Without pairs, an item is right by its class alone.
            others = [classes[1 - side][there[1 - side]].any(0) for side in (0, 1)]
            rows = [(there[side] & (classes[side] & others[side]).any(1)).nonzero()[:, 0] for side in (0, 1)]
        if not all(map(len, rows)):
            raise ValueError(f"There is no pair in {self.name} that can be read. Repair its files, or get them anew.")
        if classes is not None:
            first, second = (members[own] for members, own in zip(classes, rows, strict=True))
            used = first.any(0) | second.any(0)
            # Items without a class may be all that is left.
            classes = (first[:, used], second[:, used]) if used.any() else None
            class_names = [name for name, kept in zip(class_names, used.tolist(), strict=True) if kept]
        sides = [side.at(own.tolist()) for side, own in zip(self.sides, rows, strict=True)]
        rest = replace(
            self,
            sides=(sides[0], sides[1]),
            pairs=pairs,
            classes=classes,
            class_names=class_names,
            unreadable=[key for side, own in zip(named, keys, strict=True) for key in side if key not in own],
        )
        return rest, [found.cumsum(0)[own] - 1 for found, own in zip(there, rows, strict=True)]

    def record(self) -> dict[str, Any]:
        """Return what a result says of the data."""
        counts = {NOUNS[modality]: size for modality, size in zip(self.modalities, self.sizes, strict=True)}
        fingerprint = {part.modality: part.fingerprint for part in self.sides}
        if self.pairs is not None:
            fingerprint["pairs"] = hashlib.sha256(self.pairs.numpy().tobytes()).hexdigest()
        if self.classes is not None:
            members = b"".join(part.numpy().tobytes() for part in self.classes)
            fingerprint["classes"] = hashlib.sha256(json.dumps(self.class_names).encode() + members).hexdigest()
        return {
            "name": self.name,
            "items": {**counts, **({"classes": len(self.class_names)} if self.class_names else {})},
            "fingerprint": fingerprint,
            "missing": [shown(name) for name in self.missing],
            "unreadable": [shown(name) for name in self.unreadable],
            "empty": self.empty,
            "licence": self.licence,
        }


class _Rows:
    """Rows of two names or texts and perhaps classes, gathered into a `PairedSet`."""

    def __init__(
        self, modalities: tuple[str, str], folders: tuple[Path | None, Path | None], limit: int | None
    ) -> None:
        self.modalities, self.folders, self.limit = modalities, folders, limit
        self.names: tuple[list[str], list[str]] = ([], [])
        self.pairs: dict[tuple[int, int], None] = {}
        self.empty = 0
        self.missing: dict[str, None] = {}
        self._found: tuple[dict[str, bool], dict[str, bool]] = ({}, {})
        self._rows: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._labels: tuple[dict[int, set[str]], dict[int, set[str]]] = (defaultdict(set), defaultdict(set))
        # The limit counts what has several captions, not those.
        self._counted = 1 if modalities[0] == "text" else 0

    def add(self, first: Sequence[Any], second: Sequence[Any], labels: Iterable[Any] = ()) -> None:
        """Add a row: what is in its cells of either side belongs together, but for empty ones and missing files."""
        cells = [[str(cell) for cell in side if not _is_empty(cell)] for side in (first, second)]
        if not all(cells):
            self.empty += 1
            return
        known, names = self._rows[self._counted], self.names[self._counted]
        if self.limit and len(names) >= self.limit and not any(cell in known for cell in cells[self._counted]):
            return
        cells = [[cell for cell in own if self._is_there(side, cell)] for side, own in enumerate(cells)]
        if not all(cells):
            return
        firsts, seconds = ([self._row(side, cell) for cell in own] for side, own in enumerate(cells))
        self.pairs |= dict.fromkeys((one, other) for one in firsts for other in seconds)
        own = {str(label) for label in labels if not _is_empty(label)}
        for side, rows in enumerate((firsts, seconds)):
            for row in rows:
                self._labels[side][row] |= own

    def _is_there(self, side: int, cell: str) -> bool:
        folder, found = self.folders[side], self._found[side]
        if folder is None:
            return True
        if cell not in found:
            found[cell] = os.path.isfile(os.path.join(folder, cell))
            self.missing |= {} if found[cell] else {cell: None}
        return found[cell]

    def _row(self, side: int, cell: str) -> int:
        names, rows = self.names[side], self._rows[side]
        if self.modalities[side] == "text" or cell not in rows:
            rows[cell] = len(names)
            names.append(cell)
        return rows[cell]

    def gather(self, name: str, remedy: str, licence: str | None = None) -> PairedSet:
        if not self.pairs:
            left = left_out({"missing": list(self.missing), "empty": self.empty})
            raise ValueError(f"There is no pair in {name}{left and f', but {left}'}. {remedy}")
        sides = [
            Items.listed(modality, names, folder)
            for modality, names, folder in zip(self.modalities, self.names, self.folders, strict=True)
        ]
        labels = [[self._labels[side][row] for row in range(len(names))] for side, names in enumerate(self.names)]
        classes, class_names = _classes(labels)
        return PairedSet(
            name=name,
            sides=(sides[0], sides[1]),
            pairs=torch.tensor(list(self.pairs)),
            classes=classes,
            class_names=class_names,
            missing=list(self.missing),
            empty=self.empty,
            licence=licence,
        )


def _is_empty(cell: Any) -> bool:
    # NaN, which is not itself, is how pandas writes an empty cell.
    return cell is None or cell != cell or not str(cell).strip()


def _classes(labels: Sequence[Sequence[set[str]]]) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, list[str]]:
    """Number the classes of both sides alike; None where no item has one."""
    names = sorted({name for side in labels for own in side for name in own})
    if not names:
        return None, []
    check_class_names(names)
    number = {name: place for place, name in enumerate(names)}
    found = [torch.zeros(len(side), len(names), dtype=torch.bool) for side in labels]
    for side, members in zip(labels, found, strict=True):
        for row, own in enumerate(side):
            members[row, [number[name] for name in own]] = True
    return (found[0], found[1]), names


def load_pairs(
    data: str,
    columns: Sequence[tuple[str, str]],
    *,
    files: str | None = None,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> PairedSet:
    """Read pairs from the columns of a table or a data set.

    Args:
        data: a table (.csv, .tsv, .jsonl, .parquet), or a data set for `datasets.load_dataset`, an id or a folder.
        columns: what is in them: two of `image`, `audio`, `point_cloud` and `text`, and perhaps `class`. Several
            columns, or a list in a cell, are several captions of one row. Where the class of a row is empty, its items
            are measured as pairs alone.
        files: folder that the file names of a table are relative to; the table's own by default.

    Raises:
        ValueError: a column is missing or has no class, or all files are missing; names it.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, column in columns:
        by_kind[kind].append(column)
    label = by_kind.pop("class", [])
    if len(by_kind) != 2 or len(label) > 1 or not set(by_kind) <= {*SUFFIXES, "text"}:
        raise ValueError(
            f"Expected the columns of two of image, audio, point_cloud and text and of one class at most, got "
            f"{', '.join(f'{kind}={column}' for kind, column in columns)}. Write --columns image=FILE text=CAPTION."
        )
    if is_table(data):
        pairs = _load_table_pairs(data, by_kind, label[0] if label else None, files, limit)
    else:
        pairs = _load_data_set(data, by_kind, label[0] if label else None, config, split, limit)
    if label and pairs.classes is None:
        raise ValueError(f"The column {label[0]!r} of {data} names no class in any row. Fill it in, or leave it out.")
    return pairs


def _load_table_pairs(
    data: str, by_kind: dict[str, list[str]], label: str | None, files: str | None, limit: int | None
) -> PairedSet:
    first, second = by_kind
    if is_address(data):
        raise ValueError(f"Expected a table on this machine, got {data}. Download it with its files first.")
    path = Path(data)
    table = load_table(path)
    for column in [*by_kind[first], *by_kind[second], *([label] if label else [])]:
        if column not in table:
            raise ValueError(f"The table {path} has no column {column!r}, it has {', '.join(table)}.")
    folder = Path(files) if files else path.parent
    folders = (None if first == "text" else folder, None if second == "text" else folder)
    rows = _Rows((first, second), folders, limit)
    for row in range(len(table[by_kind[first][0]])):
        one, other = (_cells(table, kind, by_kind[kind], row) for kind in (first, second))
        rows.add(one, other, [table[label][row]] if label else [])
    return rows.gather(path.name, f"Check the columns, and the files in {str(folder)!r}.")


def _cells(table: dict[str, list[Any]], kind: str, columns: Sequence[str], row: int) -> list[Any]:
    """Return what the columns of a row hold, of a list each one."""
    cells = [table[column][row] for column in columns]
    spread = [part for cell in cells for part in (cell if isinstance(cell, list) else [cell])]
    for cell in spread:
        if cell is not None and not isinstance(cell, (str, int, float) if kind == "text" else str):
            raise ValueError(
                f"Expected a {'text' if kind == 'text' else 'file name'} in {' or '.join(columns)} of row {row}, got "
                f"{cell!r:.80}. Name another column, or, where the items themselves are in the table, pass its folder "
                "as a data set."
            )
    return spread


def rooted(data: str) -> tuple[Path, str]:
    """Return a root and a name below it for a data set, such that the keys of its items name no place of a machine."""
    path = Path(data)
    return (path.parent, path.name) if path.is_absolute() else (Path(), data)


def _load_data_set(
    data: str, by_kind: dict[str, list[str]], label: str | None, config: str | None, split: str, limit: int | None
) -> PairedSet:
    """Read pairs from a data set: media stay in it and are read when they are embedded, texts are held in memory."""
    root, name = rooted(data)
    sides: list[Items] = []
    places: list[list[str]] = []
    labels: list[list[set[str]]] = []
    for kind, columns in by_kind.items():
        # With any limit, rows are numbered through all files of the data set.
        most = limit if kind != "text" or limit is None else sys.maxsize
        spec = DataSpec(dataset=name, column=columns, config=config, split=split, label=label, limit=most)
        items = Items([spec], kind, root)
        found = [(item.key, item.value, item.label) for item in items] if kind == "text" else None
        keyed = found or [(item.key, None, item.label) for item in items]
        places.append([key.removeprefix(f"{name}/{split}/").split("/")[0] for key, _, _ in keyed])
        labels.append([set() if own is None else {own} for _, _, own in keyed])
        sides.append(items if found is None else Items.listed("text", [str(value) for _, value, _ in found]))
    return _align(Path(data).name, sides, places, labels, limit is not None)


def _align(
    name: str, sides: list[Items], places: list[list[str]], labels: list[list[set[str]]], limited: bool
) -> PairedSet:
    """Pair the items of two sides that are of one row, and leave out those of rows with an empty cell."""
    first, second = map(set, places)
    both, single = first & second, first ^ second
    if limited and both:
        # Behind a limit, it is not the other cell that an item lacks.
        last = max(map(int, both))
        single = {place for place in single if int(place) <= last}
    for side, items in enumerate(sides):
        kept = [row for row, place in enumerate(places[side]) if place in both]
        if len(kept) == len(places[side]) or not kept:
            continue
        texts = [str(item.value) for item in items] if items.modality == "text" else []
        sides[side] = Items.listed("text", [texts[row] for row in kept]) if texts else items.at(kept)
        places[side], labels[side] = [places[side][row] for row in kept], [labels[side][row] for row in kept]
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, place in enumerate(places[1]):
        rows_of[place].append(row)
    pairs = [(row, other) for row, place in enumerate(places[0]) for other in rows_of[place]]
    if not pairs:
        left = left_out({"empty": len(single)})
        raise ValueError(f"There is no pair in {name}{left and f', but {left}'}. Check the columns.")
    classes, class_names = _classes(labels)
    return PairedSet(name, (sides[0], sides[1]), torch.tensor(pairs), classes, class_names, empty=len(single))


def load_folders(images: Path, audio: Path, label: str, limit: int | None = None) -> PairedSet:
    """Read a folder of images and one of audio files, whose classes are their folders' names or their own.

    Nothing is paired: every item of a class is right for every other one.

    Args:
        label: `parent` or `stem`.

    Raises:
        ValueError: a folder has no such files, or a class has none on one side.
    """
    from .connection import check_classes

    sides = [
        Items([DataSpec(folder=str(folder), label=label, limit=limit)], modality, Path(), strict=False)
        for modality, folder in (("audio", audio), ("image", images))
    ]
    labels = [[{str(item.label)} for item in side] for side in sides]
    first, second = ([min(own) for own in side] for side in labels)
    check_classes(first, second)
    return PairedSet("folders", (sides[0], sides[1]), None, *_classes(labels))


def load_ave(folder: Path, *, limit: int | None = None) -> PairedSet:
    """Read AVE (Tian et al., 2018): 4,143 events in 4,097 videos, each of which is a pair with all its categories."""
    remedy = f"{str(folder)!r} has to hold {AVE}."
    try:
        lines = (folder / "Annotations.txt").read_text(encoding="utf-8").splitlines()
        # The first line names the fields.
        events = [line.split("&") for line in lines[1:] if line.strip()]
        entries = [(video, category) for category, video, _, _, _ in events]
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected AVE. {remedy} ({error})") from error
    return _sounding("AVE", folder, entries, remedy, limit)


def load_sounding(
    name: str, folder: Path, lists: Sequence[str], of: str, *, chosen: Path | None = None, limit: int | None = None
) -> PairedSet:
    """Read Flickr-SoundNet (Aytar et al., 2016) or VGG-SS (Chen et al., 2021): a list of names, `frames` and `audio`.

    Args:
        lists: files of the names, of which the first that is there is read: .csv, or .json with classes.
        of: data set that the frames and the sounds are of.
        chosen: another list.
    """
    remedy = f"{str(folder)!r} has to hold {SOUNDING.format(lists=' or '.join(lists), of=of)}."
    path = chosen or next((folder / each for each in lists if (folder / each).is_file()), folder / lists[0])
    entries: list[tuple[str, str | None]] = []
    try:
        if path.suffix == ".json":
            entries = [(entry["file"], entry["class"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
        else:
            with path.open(encoding="utf-8", newline="") as file:
                entries = [(row[0], None) for row in csv.reader(file) if row]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"Expected {name}. {remedy} ({error})") from error
    return _sounding(name, folder, entries, remedy, limit)


def _sounding(
    name: str, folder: Path, entries: Iterable[tuple[str, str | None]], remedy: str, limit: int | None
) -> PairedSet:
    sounds, frames = _by_stem(folder / "audio", "audio"), _by_stem(folder / "frames", "image")
    rows = _Rows(("audio", "image"), (folder / "audio", folder / "frames"), limit)
    for stem, label in entries:
        if stem in sounds and stem in frames:
            rows.add([sounds[stem]], [frames[stem]], [label])
        else:
            rows.missing[stem] = None
    return rows.gather(name, remedy, "research only")


def _by_stem(folder: Path, modality: str) -> dict[str, str]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.stem: path.name for path in paths if path.suffix.lower() in SUFFIXES[modality]}


def load_audiocaps(folder: Path, split: str = "test", *, limit: int | None = None) -> PairedSet:
    """Read AudioCaps (Kim et al., 2019): of its test split 975 clips with five captions each, a row a caption."""
    remedy = f"{str(folder)!r} has to hold {AUDIOCAPS.format(split=split)}."
    path = folder / f"{split}.csv"
    try:
        table = load_table(path)
        entries = list(
            zip(*(table[name] for name in ("audiocap_id", "youtube_id", "start_time", "caption")), strict=True)
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"Expected AudioCaps. {remedy} ({error})") from error
    clips = _by_stem(folder / "audio", "audio")
    rows = _Rows(("audio", "text"), (folder / "audio", None), limit)
    found: dict[tuple[str, str], str] = {}
    # First of all rows: a clip may be named by the number of any of its captions.
    for number, video, start, _ in entries:
        for name in (f"{video}_{start}", video, f"Y{video}", str(number)):
            if name in clips:
                found.setdefault((video, start), clips[name])
    for _, video, start, caption in entries:
        if (video, start) in found:
            rows.add([found[video, start]], [caption])
        else:
            rows.missing[video] = None
    return rows.gather("AudioCaps", remedy, "MIT (the captions)")


def load_clotho(folder: Path, split: str = "evaluation", *, limit: int | None = None) -> PairedSet:
    """Read Clotho (Drossos et al., 2020): of its evaluation split 1,045 clips with five captions each."""
    remedy = f"{str(folder)!r} has to hold {CLOTHO.format(split=split)}."
    try:
        table = load_table(folder / f"clotho_captions_{split}.csv")
        captions = [table[f"caption_{number}"] for number in range(1, 6)]
        names = table["file_name"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"Expected Clotho. {remedy} ({error})") from error
    rows = _Rows(("audio", "text"), (folder / split, None), limit)
    for name, *own in zip(names, *captions, strict=True):
        rows.add([name], own)
    return rows.gather("Clotho", remedy, "Tampere University licence, research only")


def load_coco(folder: Path, split: str | None = None, *, limit: int | None = None) -> PairedSet:
    """Read COCO captions: a Karpathy split (of `test`, 5,000 images), or the official validation captions.

    An image has five captions, some have six or seven, all of which count: 25,010 of the Karpathy test split.

    Args:
        split: of Karpathy, by default `test`; the official captions have none.
    """
    remedy = f"{str(folder)!r} has to hold {COCO}."
    official = [folder / "annotations" / f"captions_val{year}.json" for year in (2014, 2017)]
    karpathy = folder / KARPATHY
    if split is not None and not karpathy.is_file():
        raise ValueError(f"{str(folder)!r} has no {KARPATHY}, whose split {split!r} is. Get it, or leave it out.")
    path = next((each for each in (karpathy, *official) if each.is_file()), None)
    try:
        if path is None:
            raise ValueError("there is none of these files")
        document = json.loads(path.read_text(encoding="utf-8"))
        if path == karpathy:
            chosen = [image for image in document["images"] if image["split"] == (split or "test")]
            entries = [
                (f"{image['filepath']}/{image['filename']}", sentence["raw"])
                for image in chosen
                for sentence in image["sentences"]
            ]
        else:
            place = path.stem.removeprefix("captions_")
            files = {image["id"]: f"{place}/{image['file_name']}" for image in document["images"]}
            entries = [(files[entry["image_id"]], entry["caption"]) for entry in document["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Expected COCO captions. {remedy} ({error!s:.200})") from error
    rows = _Rows(("image", "text"), (folder, None), limit)
    for name, caption in entries:
        rows.add([name], [caption])
    return rows.gather("COCO", remedy, "CC BY 4.0 (the captions); Flickr terms (the images)")
