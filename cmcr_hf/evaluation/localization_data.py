"""Pictures with their sounds and the boxes of what sounds: VGG-SS, Flickr-SoundNet, MUSIC, and the extended two.

None of them comes with this package, and none of their files is downloaded. The layouts are those of the official
code: hche11/Localizing-Visual-Sounds-the-Hard-Way for VGG-SS (arXiv 2104.02691) and Flickr-SoundNet (boxes of
ardasnck/learning_to_localize_sound_source, arXiv 1803.03849), stoneMo/SLAVC for the extended ones (arXiv 2209.09634),
stoneMo/AVGN for MUSIC (arXiv 2303.17056; boxes of DTaoo/Discriminative-Sounding-Objects-Localization, 2010.05466).

Every folder has `frames/NAME.jpg`, one picture a pair, and `audio/NAME.wav`, other suffixes of pictures and sounds
being as good. Pairs whose picture or sound is missing, as videos vanish, or cannot be read are left out and named.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..training.data import SUFFIXES, Items
from .boxes import Box
from .result import shown

SILENT = "non-sounding"
# Name of the picture, boxes, label, and name of the sound.
_Entry = tuple[str, tuple[Box, ...], str | None, str]
_FILES = "frames/NAME.jpg and audio/NAME.wav"
_VGG_SS = (
    "Expected VGG-SS in {folder}: vggss.json of github.com/hche11/Localizing-Visual-Sounds-the-Hard-Way (metadata), a "
    "list of {{file, class, bbox: [[x0, y0, x1, y1], ...]}} in parts of the picture, and "
    f"{_FILES}, NAME being `file`: the middle frame and the sound of the ten seconds of VGGSound "
    "(www.robots.ox.ac.uk/~vgg/data/vggsound)"
)
_FLICKR = (
    "Expected Flickr-SoundNet in {folder}: Annotations/NAME.xml, with the boxes of three annotators, and "
    f"{_FILES}, of github.com/ardasnck/learning_to_localize_sound_source, and flickr_test.csv of "
    "github.com/hche11/Localizing-Visual-Sounds-the-Hard-Way (metadata), whose first column has the names of 250 pairs"
)
_MUSIC = (
    "Expected MUSIC-Solo in {folder}: music_solo.json of github.com/stoneMo/AVGN (metadata), a list of {{file, class, "
    "bbox: [x, y, width, height]}} in parts of the picture, and of the videos of github.com/roudimit/MUSIC_dataset "
    "frames/FILE.jpg and audio/CLIP.wav, where FILE is CLIP_FRAME, CLIP is VIDEO_SECOND; and music_solo_test.csv, if "
    "not all of them are to count, whose first column has the names of those"
)
_EXTENDED = (
    ". Extended, it has beside them {table} of github.com/stoneMo/SLAVC (in the archives that its page links, and in "
    "metadata of github.com/kaistmm/SSLalignment), rows of video,audio,label, and the frames/VIDEO.jpg and "
    f"audio/AUDIO.wav of those labelled {SILENT}"
)


# Borders of a box may lie a little outside of the picture, in parts of it; pixels lie far outside.
FARTHEST = 2.0


@dataclass(frozen=True)
class SoundingPicture:
    """A picture, a sound, and the boxes of what in the picture sounds: none where nothing does.

    Args:
        key: names the pair in its data set.
        image, audio: paths below the folder of the data set.
        label: class of the sound, where there is one, or `SILENT` where nothing in the picture sounds.
        video: what the picture is of; pictures of one video are no independent samples.
    """

    key: str
    image: str
    audio: str
    boxes: tuple[Box, ...]
    label: str | None
    video: str


@dataclass(frozen=True)
class SoundingPictures:
    """The pairs of a data set that are there.

    Args:
        consensus: how many boxes make a pixel certain (see [`consensus_map`]).
        missing: names of the pairs that are left out, since picture or sound is not there.
        unreadable: pictures and sounds that cannot be read, whose pairs are left out too.
    """

    folder: Path
    pairs: list[SoundingPicture]
    consensus: int
    missing: list[str]
    unreadable: list[str] = field(default_factory=list)

    def first(self, count: int | None) -> SoundingPictures:
        """Return the first pairs, so many in all; of a data set with silent ones, half of them those."""
        if count is None:
            return self
        sounding = [pair for pair in self.pairs if pair.label != SILENT]
        silent = [pair for pair in self.pairs if pair.label == SILENT]
        quiet = min(count // 2, len(silent))
        return replace(self, pairs=sounding[: count - quiet] + silent[:quiet])

    @property
    def images(self) -> list[str]:
        """The pictures of the pairs, each once."""
        return list(dict.fromkeys(pair.image for pair in self.pairs))

    @property
    def sounds(self) -> list[str]:
        """The sounds of the pairs, each once."""
        return list(dict.fromkeys(pair.audio for pair in self.pairs))

    def readable(self, files: Collection[str]) -> SoundingPictures:
        """Return the pairs of which picture and sound are among some files.

        Raises:
            ValueError: there is none.
        """
        pairs = [pair for pair in self.pairs if pair.image in files and pair.audio in files]
        if not pairs:
            raise ValueError(f"No pair in {self.folder} can be read. Repair its files, or get them anew.")
        unreadable = [name for name in [*self.images, *self.sounds] if name not in files]
        return replace(self, pairs=pairs, unreadable=unreadable)

    def videos(self) -> torch.Tensor:
        """Return a number for each pair, `(pairs,)` from 0 on, the same for those of one video."""
        numbers = {video: place for place, video in enumerate(dict.fromkeys(pair.video for pair in self.pairs))}
        return torch.tensor([numbers[pair.video] for pair in self.pairs])

    def record(self) -> dict[str, Any]:
        """Return what tells the data from other data."""
        silent = sum(pair.label == SILENT for pair in self.pairs)
        boxes = hashlib.sha256(json.dumps([[pair.key, pair.boxes] for pair in self.pairs]).encode())
        return {
            "items": {"pairs": len(self.pairs), "videos": len({pair.video for pair in self.pairs})}
            | ({"non-sounding": silent} if silent else {}),
            "missing": [shown(name) for name in self.missing],
            "unreadable": [shown(name) for name in self.unreadable],
            "fingerprint": {
                "image": Items.listed("image", [pair.image for pair in self.pairs], self.folder).fingerprint,
                "audio": Items.listed("audio", [pair.audio for pair in self.pairs], self.folder).fingerprint,
                "boxes": boxes.hexdigest(),
            },
        }


def load_vgg_ss(folder: str | Path) -> SoundingPictures:
    """Read VGG-SS, 5158 pairs: `vggss.json`, `frames` and `audio`.

    Raises:
        ValueError: a file is missing or damaged, or no pair is there; says where to get what.
    """
    folder = Path(folder)
    remedy = _VGG_SS.format(folder=folder)
    found = [_as_dict(entry, remedy) for entry in _read_json(folder / "vggss.json", remedy)]
    entries = [_entry(entry, entry.get("bbox"), _corners, remedy) for entry in found]
    return _pairs(folder, entries, 1, remedy, after=1)


def load_music(folder: str | Path) -> SoundingPictures:
    """Read MUSIC-Solo: `music_solo.json`, perhaps `music_solo_test.csv`, `frames` and `audio`.

    The boxes of the release have width and height, as its source has; AVGN's own code takes them for corners, so that
    many of its maps are empty. A list of the 489 pairs that the C-MCR paper counts was not to be found.

    Raises:
        ValueError: as for [`load_vgg_ss`].
    """
    folder = Path(folder)
    remedy = _MUSIC.format(folder=folder)
    found = [_as_dict(entry, remedy) for entry in _read_json(folder / "music_solo.json", remedy)]
    entries = [_entry(entry, [entry.get("bbox")], _sides, remedy) for entry in found]
    if (folder / "music_solo_test.csv").is_file():
        chosen = set(_first_column(folder / "music_solo_test.csv", remedy))
        entries = [entry for entry in entries if entry[0] in chosen]
    # FILE is CLIP_FRAME.
    entries = [(name, boxes, label, name.rpartition("_")[0]) for name, boxes, label, _ in entries]
    return _pairs(folder, entries, 1, remedy, after=2)


def load_flickr_soundnet(folder: str | Path) -> SoundingPictures:
    """Read the annotated Flickr-SoundNet, 250 pairs: `flickr_test.csv`, `Annotations`, `frames` and `audio`.

    An XML file has an element an annotator, in which each `bbox` ends with the numbers xmin, ymin, xmax and ymax, in
    256ths of the picture. A pixel in two boxes is certain.

    Raises:
        ValueError: as for [`load_vgg_ss`].
    """
    folder = Path(folder)
    remedy = _FLICKR.format(folder=folder)
    names = _first_column(folder / "flickr_test.csv", remedy)
    boxes = [_annotated(folder / "Annotations" / f"{name}.xml", remedy) for name in names]
    return _pairs(folder, [(name, found, None, name) for name, found in zip(names, boxes, strict=True)], 2, remedy)


def load_extended_vgg_ss(folder: str | Path) -> SoundingPictures:
    """Read Extended VGG-SS: VGG-SS and the 5158 pairs of `vggss_test_plus_silent.csv` in which nothing sounds.

    Raises:
        ValueError: as for [`load_vgg_ss`].
    """
    return _extended(Path(folder), load_vgg_ss, "vggss_test_plus_silent.csv", _VGG_SS, after=1)


def load_extended_flickr_soundnet(folder: str | Path) -> SoundingPictures:
    """Read Extended Flickr-SoundNet: the 250 pairs and as many of `flickr_test_plus_silent.csv`, with other sounds.

    Raises:
        ValueError: as for [`load_vgg_ss`].
    """
    return _extended(Path(folder), load_flickr_soundnet, "flickr_test_plus_silent.csv", _FLICKR, after=0)


def _extended(
    folder: Path, load: Callable[[Path], SoundingPictures], table: str, remedy: str, *, after: int
) -> SoundingPictures:
    sounding = load(folder)
    remedy = (remedy + _EXTENDED).format(folder=folder, table=table)
    rows = _read_table(folder / table, remedy)
    # As in SLAVC, what has another label is not read.
    silent: list[_Entry] = [(row[0], (), SILENT, row[1]) for row in rows if row[2:] == [SILENT]]
    found = _pairs(folder, silent, sounding.consensus, remedy, after=after)
    return replace(sounding, pairs=sounding.pairs + found.pairs, missing=sounding.missing + found.missing)


def _pairs(
    folder: Path, entries: Sequence[_Entry], consensus: int, remedy: str, *, after: int = 0
) -> SoundingPictures:
    """Return the pairs that are there.

    Args:
        after: how many parts of a name, cut off by underscores, stand behind that of the video.
    """
    images, sounds = _by_name(folder, "frames", "image"), _by_name(folder, "audio", "audio")
    pairs, missing = [], []
    for name, boxes, label, sound in entries:
        key = f"{name} {sound}" if label == SILENT else name
        if name not in images or sound not in sounds:
            missing.append(key)
            continue
        video = name.rsplit("_", after)[0]
        pairs.append(SoundingPicture(key, images[name], sounds[sound], boxes, label, video))
    if not pairs:
        raise ValueError(f"{remedy}. Of {len(entries)} pairs, none has both picture and sound.")
    return SoundingPictures(folder, pairs, consensus, missing)


def _by_name(folder: Path, part: str, modality: str) -> dict[str, str]:
    found = sorted((folder / part).iterdir()) if (folder / part).is_dir() else []
    own = [path for path in found if path.suffix.lower() in SUFFIXES[modality] and path.is_file()]
    return {path.stem: f"{part}/{path.name}" for path in own}


def _entry(entry: dict[str, Any], boxes: Any, box: Callable[[Sequence[float]], Box], remedy: str) -> _Entry:
    """Return what an entry of a JSON file says."""
    name = entry.get("file")
    if not isinstance(name, str) or not isinstance(boxes, list):
        raise ValueError(f"{remedy}. Got the entry {str(entry)[:120]}.")
    found = tuple(_checked(box(_four_numbers(numbers, name, remedy)), numbers, name, remedy) for numbers in boxes)
    return name, found, entry.get("class"), name


def _as_dict(entry: Any, remedy: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{remedy}. Got the entry {str(entry)[:120]}.")
    return entry


def _four_numbers(numbers: Any, name: str, remedy: str) -> list[float]:
    try:
        values = [float(number) for number in numbers]
    except (TypeError, ValueError):
        values = []
    if len(values) != 4 or not all(map(math.isfinite, values)):
        raise ValueError(f"{remedy}. Of {name!r}, a box is {str(numbers)[:80]}.")
    return values


def _checked(box: Box, numbers: Any, name: str, remedy: str) -> Box:
    """Refuse a box in pixels, which would be far outside of every picture, and one of swapped corners."""
    left, top, right, bottom = box
    if max(map(abs, box)) > FARTHEST or right < left or bottom < top:
        raise ValueError(
            f"{remedy}. Of {name!r}, a box is {str(numbers)[:80]}, expected parts of the picture from 0 to 1, the "
            "left and the upper border before the others."
        )
    return box


def _corners(numbers: Sequence[float]) -> Box:
    left, top, right, bottom = numbers
    return left, top, right, bottom


def _sides(numbers: Sequence[float]) -> Box:
    left, top, width, height = numbers
    return left, top, left + width, top + height


def _annotated(path: Path, remedy: str) -> tuple[Box, ...]:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{remedy}. Cannot read {path}: {error}.") from error
    # The first of the five that a `bbox` has is no number; the last four are told by their place, not by a name.
    texts = [[part.text for part in list(box)[-4:]] for annotator in root for box in annotator.iter("bbox")]
    boxes = [_four_numbers(numbers, path.name, remedy) for numbers in texts]
    return tuple(_corners([number / 256 for number in numbers]) for numbers in boxes)


def _read_json(path: Path, remedy: str) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{remedy}. Cannot read {path}: {error}.") from error
    if not isinstance(content, list):
        raise ValueError(f"{remedy}. Got a {type(content).__name__} in {path}.")
    return content


def _read_table(path: Path, remedy: str) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{remedy}. Cannot read {path}: {error}.") from error


def _first_column(path: Path, remedy: str) -> list[str]:
    return [row[0] for row in _read_table(path, remedy)]
