"""Items with classes, to be named without training: benchmarks in the layouts they are published in, and own data."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..training.data import Items, load_table
from ..training.recipe import DataSpec
from .result import shown

# Words for each class, by its name in the data set or in the order of these names.
Words = Mapping[str, Sequence[str]] | list[list[str]]

ESC50 = (
    "meta/esc50.csv and audio/*.wav, as in the archive of https://github.com/karolpiczak/ESC-50 (CC BY-NC 3.0; 2,000 "
    "clips of 50 classes)"
)
AUDIOSET = (
    "eval_segments.csv and class_labels_indices.csv of https://research.google.com/audioset/download.html (CC BY 4.0; "
    "ontology.json serves instead of the latter), and anywhere below it the clips, which are not part of AudioSet: "
    "YTID.wav, YYTID.wav or YTID_START.wav, .flac and .mp3 too"
)
IMAGENET = (
    "a folder CLASS/*.JPEG a class, as in train and, sorted into folders, val of ILSVRC 2012 (https://image-net.org, "
    "for research only), and in it or beside it LOC_synset_mapping.txt (of the Kaggle competition "
    "imagenet-object-localization-challenge), or else --names FILE"
)
FOLDS = range(1, 6)
# Every video of AudioSet has one segment, so that its id of this length tells the clip.
_ID_LENGTH = 11


@dataclass
class LabelledSet:
    """Items of one modality, what their classes are called, and which of them each item has.

    Args:
        name: of the data set.
        classes: names in the data set.
        words: of each class, one or more ways to say it in a prompt.
        labels: of each item, the indices of its classes: exactly one, unless `several`.
        several: whether an item may have several classes.
        missing: items that are listed in the data set, but whose files are not there.
        unreadable: items that were left out, since they cannot be read.
        part: which part of the data set it is, where that is not the one that published numbers are of.
    """

    name: str
    items: Items
    classes: list[str]
    words: list[list[str]]
    labels: list[list[int]]
    several: bool = False
    licence: str | None = None
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    part: str | None = None

    @property
    def relevant(self) -> torch.Tensor:
        """Whether an item has a class, bool `(items, classes)`."""
        found = torch.zeros(len(self.labels), len(self.classes), dtype=torch.bool)
        for row, own in zip(found, self.labels, strict=True):
            row[own] = True
        return found

    def readable(self, keys: Collection[str]) -> LabelledSet:
        """Return the set without the items that have none of the keys."""
        named = [item.key for item in self.items]
        rows = [row for row, key in enumerate(named) if key in keys]
        return replace(
            self,
            items=self.items.at(rows),
            labels=[self.labels[row] for row in rows],
            unreadable=[key for key in named if key not in keys],
        )

    def record(self) -> dict[str, Any]:
        """Return what a result says of the data."""
        return {
            "name": self.name,
            "items": {"items": len(self.labels), "classes": len(self.classes)},
            "fingerprint": self.items.fingerprint,
            "licence": self.licence,
            "missing": [shown(name) for name in self.missing],
            "unreadable": [shown(name) for name in self.unreadable],
            "part": self.part,
        }


def load_esc50(folder: Path, folds: Sequence[int] | None = None, *, limit: int | None = None) -> LabelledSet:
    """Open ESC-50 (Piczak, 2015).

    Args:
        folds: some of its five folds, 1 to 5. All by default: nothing is trained, so that zero-shot results such as
            the published ones are of all 2,000 clips.
    """
    table = Path("meta", "esc50.csv")
    if not (folder / table).is_file() or not (folder / "audio").is_dir():
        raise ValueError(f"Expected ESC-50 in the folder {str(folder)!r}. It has to hold {ESC50}.")
    where = None if folds is None else {"fold": [str(fold) for fold in folds]}
    spec = DataSpec(table=str(table), column="filename", files="audio", label="category", where=where, limit=limit)
    found = label_items("ESC-50", *items_and_whole(spec, "audio", folder), licence="CC BY-NC 3.0")
    chosen = {*(folds or FOLDS)}
    some = None if chosen == {*FOLDS} else f"fold {' and '.join(str(fold) for fold in sorted(chosen))} of five"
    return replace(found, part=some)


def load_audioset(folder: Path, *, limit: int | None = None) -> LabelledSet:
    """Open the evaluation segments of AudioSet (Gemmeke et al., 2017), each with one or more of 527 classes.

    A clip is found by the id of its video, behind which a `_` and anything may follow, and before which a `Y` may
    stand: `Y{YTID}.wav` is PANNs' naming, `{YTID}.flac` that of the data set on the Hub, `{YTID}_{start}.wav` and
    `{YTID}_{start}_{end}.flac` those of common downloaders. Many of the videos are gone: what is not there is listed
    as missing. Not all of what is there is whole: what cannot be read is left out too.
    """
    segments = folder / "eval_segments.csv"
    names_of = [path for path in (folder / "class_labels_indices.csv", folder / "ontology.json") if path.is_file()]
    if not segments.is_file() or not names_of:
        raise ValueError(f"Expected AudioSet in the folder {str(folder)!r}. It has to hold {AUDIOSET}.")
    own = _read_segments(segments)
    used = {mid for mids in own.values() for mid in mids}
    words = _read_class_names(names_of[0], used)
    if unknown := used - set(words):
        raise ValueError(f"{segments} has the class {min(unknown)!r}, unknown to {names_of[0]}. Get both anew.")
    number = {mid: index for index, mid in enumerate(words)}
    clips = _find_clips(folder, own)
    if not clips:
        raise ValueError(f"There is no clip of {segments} below {str(folder)!r}. It has to hold {AUDIOSET}.")
    names = [name for name in own if name in clips][:limit]
    return LabelledSet(
        name="AudioSet",
        items=Items.listed("audio", [clips[name] for name in names], folder),
        classes=list(words.values()),
        words=[[word] for word in words.values()],
        labels=[[number[mid] for mid in own[name]] for name in names],
        several=True,
        missing=[name for name in own if name not in clips],
        licence="CC BY 4.0 (the lists)",
    )


def _read_segments(path: Path) -> dict[str, list[str]]:
    """Return the ids of the classes of every video, from rows `YTID, start_seconds, end_seconds, "ID,ID,..."`."""
    try:
        # The heading is the last of three lines of comment.
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        return {name: ids.split(",") for name, _, _, ids in csv.reader(lines, skipinitialspace=True)}
    except (csv.Error, ValueError) as error:
        raise ValueError(f"Expected YTID, start, end and labels in {path}: {error}. Get the file anew.") from error


def _read_class_names(path: Path, used: set[str]) -> dict[str, str]:
    """Return what the classes are called by their ids: all of a table, or those of an ontology that are used."""
    try:
        if path.suffix == ".csv":
            columns = load_table(path)
            return dict(zip(columns["mid"], columns["display_name"], strict=True))
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {entry["id"]: entry["name"] for entry in entries if entry["id"] in used}
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"Expected the ids and names of classes in {path}: {error}. Get the file anew.") from error


def _find_clips(folder: Path, own: Mapping[str, object]) -> dict[str, str]:
    clips: dict[str, str] = {}
    for item in Items([DataSpec(folder=str(folder))], "audio", Path()):
        stem = Path(item.key).stem
        for name in (stem, stem[1:]) if stem.startswith("Y") else (stem,):
            if name[:_ID_LENGTH] in own and name[_ID_LENGTH : _ID_LENGTH + 1] in ("", "_"):
                clips.setdefault(name[:_ID_LENGTH], item.key)
                break
    return clips


def load_imagenet(folder: Path, words: Words | None = None, *, limit: int | None = None) -> LabelledSet:
    """Open a folder of images in one folder a class, named by WordNet ids as those of ImageNet are.

    The classes are those that have a folder, so that a part of ImageNet is told apart within itself.

    Args:
        words: by id; those of LOC_synset_mapping.txt by default.
    """
    mapping = next((path for path in _mapping_paths(folder) if path.is_file()), None)
    if words is None and mapping is not None:
        words = read_words(mapping)
    remedy = f"{str(folder)!r} has to hold {IMAGENET}."
    if words is None or not folder.is_dir():
        raise ValueError(f"Expected ImageNet. {remedy}")
    items, every = items_and_whole(DataSpec(folder=str(folder), label="parent", limit=limit), "image", Path())
    return label_items("ImageNet", items, every, words, remedy=remedy, licence="research only")


def _mapping_paths(folder: Path) -> list[Path]:
    return [place / "LOC_synset_mapping.txt" for place in (folder, folder.absolute().parent)]


def items_and_whole(spec: DataSpec, modality: str, root: Path) -> tuple[Items, Items | None]:
    """List the items of an entry, and, where it has a limit, those without it, which the classes are of."""
    items = Items([spec], modality, root, strict=False)
    # A data set that is streamed is read no further than it has to be: its classes are those of what is taken.
    if spec.limit is None or spec.dataset is not None:
        return items, None
    return items, Items([replace(spec, limit=None)], modality, root, strict=False)


def label_items(
    name: str,
    items: Items,
    every: Items | None = None,
    words: Words | None = None,
    *,
    remedy: str = "Add it to --names.",
    licence: str | None = None,
) -> LabelledSet:
    """Return items that each have one class, their label; the classes are those that occur, sorted.

    Args:
        every: the items that the classes are of, where `items` are some of them: fewer items are told apart from no
            fewer classes.
        words: of every class; by default its name, with spaces for underscores.
        remedy: where a class has no words.

    Raises:
        ValueError: an item has no class, or a class no words.
    """
    found, there, missing = [], [], []
    for row, item in enumerate(items):
        if item.label is None:
            raise ValueError(f"The item {item.key!r} has no class. Fill it in, or leave the item out.")
        found.append(item.label)
        if isinstance(item.value, Path) and not item.value.is_file():
            missing.append(item.key)
        else:
            there.append(row)
    if not there:
        raise ValueError(f"None of the files of {name} is there, for example {missing[0]}. Check where they lie.")
    classes = sorted(set(found).union(item.label for item in every or () if item.label is not None))
    check_class_names(classes)
    if words is None:
        words = {label: [label.replace("_", " ")] for label in classes}
    elif isinstance(words, list):
        if len(words) != len(classes):
            raise ValueError(f"There are {len(words)} names for {len(classes)} classes. {remedy}")
        words = dict(zip(classes, words, strict=True))
    unknown = [label for label in classes if label not in words]
    if unknown:
        raise ValueError(f"There are no words for the class {unknown[0]!r}, one of {len(unknown)} such. {remedy}")
    number = {label: index for index, label in enumerate(classes)}
    return LabelledSet(
        name=name,
        items=items.at(there) if missing else items,
        classes=classes,
        words=[list(words[label]) for label in classes],
        labels=[[number[found[row]]] for row in there],
        licence=licence,
        missing=missing,
    )


def check_class_names(names: Iterable[str]) -> None:
    """Check that none is a list, as a cell that holds several classes is written."""
    for name in names:
        if not name.startswith(("[", "{", "(")):
            continue
        try:
            several = isinstance(ast.literal_eval(name), (list, tuple, set, dict))
        except (ValueError, SyntaxError):
            several = False
        if several:
            raise ValueError(f"Expected one class in a cell, got {name:.80}. Name a column with one class a row.")


def read_words(path: Path) -> Words:
    """Read what classes are called.

    Args:
        path: lines `CLASS NAME, SYNONYM, ...` such as those of LOC_synset_mapping.txt, of which the first name counts;
            or JSON: an object that gives a class its name or a list of names, which are all used; a list of the names
            of all classes, such as those that CLIP is evaluated with; or the imagenet_class_index.json of Keras,
            `{"0": ["n01440764", NAME], ...}`.

    Raises:
        ValueError: the file is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            document = json.loads(text)
            in_order = isinstance(document, list)
            if in_order:
                document = dict(enumerate(document))
            if all(isinstance(value, list) and re.fullmatch(r"n\d{8}", value[0]) for value in document.values()):
                document = dict(document.values())
            found = {key: [value] if isinstance(value, str) else value for key, value in document.items()}
        else:
            in_order = False
            pairs = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
            found = {name: [names.split(",")[0]] for name, names in pairs}
        if not found or not all(names and all(word.strip() for word in names) for names in found.values()):
            raise ValueError("a class without a name")
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected lines `CLASS NAME`, a JSON object {{CLASS: NAME or [NAME, ...]}} or a JSON list of names in "
            f"{path}: {error}. Correct the file."
        ) from error
    words = {name: [word.replace("_", " ").strip() for word in names] for name, names in found.items()}
    return list(words.values()) if in_order else words
