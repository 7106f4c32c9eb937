"""Retrieval from files to numbers: what the command writes is what the model's own features give by hand."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import Ridge

from cmcr_hf.evaluation.baselines import BRIDGE_TEMPERATURE
from cmcr_hf.evaluation.pair_ranking import MEAN
from tests.evaluation.by_hand import (
    embed,
    embed_source,
    evaluate,
    rankings,
    resampled,
    statistic_of,
    unit,
    write_clips,
    write_data_set,
    write_photos,
    write_text,
)
from tests.evaluation.sounding_folders import write_media
from tests.media import RATE, chord, cloud, encode_audio, encode_image, patchwork

WORDS = ("a", "the", "dog", "cat", "bell", "sea", "train", "barks", "rings", "small", "red", "loud", "sound")
# The tiny CLIP reads a text up to the word of the largest number, which is the last one here.
CAPTIONS = [" ".join([*words, "of"]) for words in itertools.islice(itertools.permutations(WORDS, 3), 0, None, 17)]
KINDS = ("dog", "cat", "loud_bell", "sea")


@dataclass
class Written:
    """What a test wrote, in the order of the layout, and what of it belongs together.

    Args:
        sides: paths, encoded files, arrays or texts.
        pairs: places in both; none where only classes tell what is right.
        labels: classes of the items of each side, where the layout has them.
        data: below the folder, None where only the options name it.
        options: of the command.
    """

    modalities: tuple[str, str]
    sides: tuple[Sequence[Any], Sequence[Any]]
    pairs: Sequence[tuple[int, int]]
    labels: tuple[Sequence[set[str]], Sequence[set[str]]] | None = None
    data: str | None = ""
    options: tuple[str, ...] = ()

    def right(self, side: int) -> np.ndarray:
        found = np.zeros((len(self.sides[0]), len(self.sides[1])), bool)
        found[tuple(zip(*self.pairs, strict=True))] = True
        return found if side == 0 else found.T

    def same_class(self, side: int) -> np.ndarray:
        assert self.labels is not None
        return np.array([[bool(one & other) for other in self.labels[1 - side]] for one in self.labels[side]])

    def groups(self, side: int) -> np.ndarray:
        """The captions of an item are drawn together, whatever else by itself."""
        if self.modalities[side] != "text":
            return np.arange(len(self.sides[side]))
        return self.right(side).argmax(axis=1)


@dataclass
class Captioned:
    """Captions as they are given out to items, one to three each."""

    items: int
    texts: list[str] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)

    def add(self, item: int) -> str:
        self.pairs.append((item, len(self.texts)))
        self.texts.append(CAPTIONS[len(self.texts)])
        return self.texts[-1]

    def interleaved(self) -> list[tuple[int, str]]:
        """Give captions to the items in turn, so that those of one do not follow each other."""
        return [(item, self.add(item)) for turn in range(3) for item in range(self.items) if item % 3 >= turn]


def write_rows(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


# The layouts


def sounding(folder: Path, names: Sequence[str]) -> Written:
    """Pairs of frames and sounds, the last of which has no sound."""
    write_media(folder, names, names[:-1])
    sounds, frames = ([folder / part / f"{name}.{end}" for name in names[:-1]] for part, end in _PARTS)
    return Written(("audio", "image"), (sounds, frames), [(row, row) for row in range(len(sounds))])


_PARTS = (("audio", "wav"), ("frames", "jpg"))
# In no order, so that a list that is sorted is noticed.
_IDS = [f"{37 * row % 13:02}_-Video{row:02}" for row in range(13)]


def ave(folder: Path) -> Written:
    written = sounding(folder, _IDS)
    labels = [{KINDS[row % 4]} for row in range(len(_IDS))]
    rows = ["Category&VideoID&Quality&StartTime&EndTime"]
    rows += [f"{min(own)}&{name}&good&0&10" for name, own in zip(_IDS, labels, strict=True)]
    # A video of two events.
    rows.append(f"{KINDS[3]}&{_IDS[1]}&good&2&7")
    labels[1].add(KINDS[3])
    write_text(folder / "Annotations.txt", "\n".join(rows))
    written.labels = (labels[:-1], labels[:-1])
    return written


def flickr_soundnet(folder: Path) -> Written:
    names = [str(10000130166 + 7919 * row % 130) for row in range(13)]
    written = sounding(folder, names)
    write_rows(folder / "flickr_test.csv", [(name, row) for row, name in enumerate(names)])
    return written


def vgg_ss(folder: Path) -> Written:
    written = sounding(folder, _IDS)
    labels = [{KINDS[row // 3 % 4]} for row in range(len(_IDS))]
    entries = [
        {"file": name, "class": min(own), "bbox": [[0, 0, 1, 1]]} for name, own in zip(_IDS, labels, strict=True)
    ]
    write_text(folder / "vggss.json", json.dumps(entries))
    written.labels = (labels[:-1], labels[:-1])
    return written


def vgg_ss_by_a_list(folder: Path) -> Written:
    written = sounding(folder, _IDS)
    write_text(folder / "vggss.json", "[]")
    write_rows(folder / "mine.csv", [(name,) for name in _IDS])
    written.options = ("--list", str(folder / "mine.csv"))
    return written


def audiocaps(folder: Path) -> Written:
    own = Captioned(11)
    rows: list[tuple[Any, ...]] = [("audiocap_id", "youtube_id", "start_time", "caption")]
    rows += [(100 + row, _IDS[item], 10 * item, text) for row, (item, text) in enumerate(own.interleaved())]
    rows.append((999, "gone", 30, "a dog"))
    # By all the names that a clip may have, 104 being the number of the first caption of its own.
    forms = ["{0}.wav", "{0}_{1}.wav", "Y{0}.wav", "{0}.wav", "104.wav"]
    names = [forms[item % 4 if item != 4 else 4].format(_IDS[item], 10 * item) for item in range(11)]
    write_clips(folder / "audio", names)
    write_rows(folder / "test.csv", rows)
    return Written(("audio", "text"), ([folder / "audio" / name for name in names], own.texts), own.pairs)


def clotho(folder: Path) -> Written:
    own, names = Captioned(10), [f"Sound {37 * row % 11} (take).wav" for row in range(10)]
    rows = [("file_name", *(f"caption_{number}" for number in range(1, 6)))]
    rows += [(name, *(own.add(item) for _ in range(5))) for item, name in enumerate(names)]
    clips = write_clips(folder / "evaluation", names)
    write_rows(folder / "clotho_captions_evaluation.csv", rows)
    return Written(("audio", "text"), (clips, own.texts), own.pairs)


def coco_karpathy(folder: Path) -> Written:
    own, images = Captioned(10), []
    names = [f"COCO_val2014_{391895 - 1000 * row:012}.jpg" for row in range(10)]
    for item, name in enumerate(names):
        sentences = [{"raw": own.add(item), "tokens": []} for _ in range(1 + item % 3)]
        image = {"filepath": "val2014", "filename": name, "split": "test", "sentences": sentences}
        images += [image, {**image, "split": "train", "sentences": [{"raw": "a train", "tokens": []}]}]
    photos = write_photos(folder / "val2014", names)
    write_text(folder / "dataset_coco.json", json.dumps({"dataset": "coco", "images": images}))
    return Written(("image", "text"), (photos, own.texts), own.pairs)


def coco_official(folder: Path) -> Written:
    own, names = Captioned(10), [f"{391895 - 1000 * row:012}.jpg" for row in range(10)]
    entries = [{"image_id": 7 * item, "caption": text} for item, text in own.interleaved()]
    # The pictures are listed in another order than their captions.
    images = [{"id": 7 * item, "file_name": name} for item, name in reversed(list(enumerate(names)))]
    photos = write_photos(folder / "val2017", names)
    write_text(
        folder / "annotations" / "captions_val2017.json", json.dumps({"images": images, "annotations": entries})
    )
    return Written(("image", "text"), (photos, own.texts), own.pairs)


def jsonl_table(folder: Path) -> Written:
    own, names = Captioned(11), [f"{37 * row % 13}.jpg" for row in range(11)]
    labels = [{KINDS[item % 4]} for item in range(11)]
    rows = [
        {"photo": name, "said": [own.add(item) for _ in range(1 + item % 3)], "kind": min(labels[item])}
        for item, name in enumerate(names)
    ]
    photos = write_photos(folder / "media", names)
    write_text(folder / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    options = ("--files", str(folder / "media"), "--columns", "image=photo", "text=said", "class=kind")
    of_texts = [labels[item] for item, _ in own.pairs]
    return Written(("image", "text"), (photos, own.texts), own.pairs, (labels, of_texts), "pairs.jsonl", options)


def folders_of_classes(folder: Path) -> Written:
    """Twelve clips and ten pictures, of which all of a class are right."""
    sides, labels = [], []
    for part, count, write in (("sounds", 12, write_clips), ("photos", 10, write_photos)):
        end = "wav" if part == "sounds" else "jpg"
        write(folder / part, [f"{KINDS[row * row % 5 % 4]}/{row:02}.{end}" for row in range(count)])
        sides.append(sorted((folder / part).glob("*/*")))
        labels.append([{path.parent.name} for path in sides[-1]])
    options = ("--images", str(folder / "photos"), "--audio", str(folder / "sounds"))
    return Written(("audio", "image"), (sides[0], sides[1]), [], (labels[0], labels[1]), None, options)


def parquet_table(folder: Path) -> Written:
    """Twelve clips of ten pictures."""
    clips = write_clips(folder, [f"{37 * row % 13}.wav" for row in range(12)])
    photos = write_photos(folder, [f"{37 * row % 13}.jpg" for row in range(10)])
    pairs = [(row, row % 10) for row in range(12)]
    rows = [{"clip": clips[row].name, "photo": photos[other].name} for row, other in pairs]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    options = ("--columns", "audio=clip", "image=photo")
    return Written(("audio", "image"), (clips, photos), pairs, None, "pairs.parquet", options)


def parquet_table_of_clouds(folder: Path) -> Written:
    own, clouds = Captioned(10), [cloud(item) for item in range(10)]
    folder.mkdir(exist_ok=True)
    for item, points in enumerate(clouds):
        np.save(folder / f"{item}.npy", points)
    rows = [{"shape": f"{item}.npy", "first": own.add(item), "second": own.add(item)} for item in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    options = ("--columns", "point_cloud=shape", "text=first", "text=second")
    return Written(("point_cloud", "text"), (clouds, own.texts), own.pairs, None, "pairs.parquet", options)


def data_set_of_clips(folder: Path) -> Written:
    own = Captioned(10)
    clips = [encode_audio(chord(RATE // 4, seed=item)) for item in range(10)]
    captions = [[own.add(item) for _ in range(1 + item % 3)] for item in range(10)]
    features = datasets.Features({"sound": datasets.Audio(), "captions": datasets.List(datasets.Value("string"))})
    columns = {"sound": [{"bytes": clip, "path": None} for clip in clips], "captions": captions}
    write_data_set(folder / "set", columns, features)
    options = ("--split", "test", "--columns", "audio=sound", "text=captions")
    return Written(("audio", "text"), (clips, own.texts), own.pairs, None, "set", options)


def data_set_of_clouds(folder: Path) -> Written:
    clouds = [cloud(item) for item in range(10)]
    photos = [encode_image(patchwork(seed=item)) for item in range(10)]
    points = datasets.List(datasets.List(datasets.Value("float32")))
    features = datasets.Features({"points": points, "render": datasets.Image()})
    columns = {
        "points": [points.tolist() for points in clouds],
        "render": [{"bytes": photo, "path": None} for photo in photos],
    }
    write_data_set(folder / "set", columns, features)
    options = ("--split", "test", "--columns", "point_cloud=points", "image=render")
    pairs = [(item, item) for item in range(10)]
    return Written(("point_cloud", "image"), (clouds, photos), pairs, None, "set", options)


LAYOUTS = {
    "ave": [ave],
    "flickr-soundnet": [flickr_soundnet],
    "vgg-ss": [vgg_ss, vgg_ss_by_a_list],
    "audiocaps": [audiocaps],
    "clotho": [clotho],
    "coco": [coco_karpathy, coco_official],
    "pairs": [
        jsonl_table,
        parquet_table,
        parquet_table_of_clouds,
        data_set_of_clips,
        data_set_of_clouds,
        folders_of_classes,
    ],
}
NOUNS = {"audio": "clips", "image": "images", "text": "texts", "point_cloud": "clouds"}
# The source of what is said of a text, that alone.
NATIVE = {"audio": "clap", "image": "clip"}


def check(found: dict[str, Any], method: str, written: Written, scores: Sequence[np.ndarray]) -> None:
    """Compare all numbers of a method with those of its scores in both directions."""
    metrics, intervals = found["metrics"][method], found["intervals"][method]
    by_class, means = ", by class" if written.pairs else "", []
    for side in (0, 1):
        direction = "_to_".join(written.modalities[:: 1 - 2 * side])
        expected = {}
        if written.pairs:
            kinds = ("R@1", "R@5", "R@10", "mAP", "median rank")
            expected[""] = kinds, rankings(scores[side], written.right(side))
        if written.labels is not None:
            expected[by_class] = ("P@1", "P@10", "mAP"), rankings(scores[side], written.same_class(side))
        for suffix, (kinds, values) in expected.items():
            values = {name: values[name] for name in kinds if name in values}
            numbers = {name: statistic_of(name)(own) for name, own in values.items()}
            assert metrics[direction + suffix] == pytest.approx(numbers, abs=1e-9), method
            for name, own in values.items():
                ends = resampled(own, statistic_of(name), written.groups(side))
                assert intervals[direction + suffix][name] == pytest.approx(ends, abs=1e-9), name
            means += [] if suffix else [numbers]
    if not written.pairs:
        assert MEAN not in metrics
        return
    both = {name: (means[0][name] + means[1][name]) / 2 for name in means[0] if name in means[1]}
    del both["median rank"]
    assert metrics[MEAN] == pytest.approx(both, abs=1e-9)


@pytest.mark.parametrize(
    ("layout", "write"),
    [pytest.param(name, write, id=write.__name__) for name, all in LAYOUTS.items() for write in all],
)
def test_the_numbers_of_every_layout_are_those_of_the_model(
    tiny_model: Path, tiny_ulip_model: Path, tmp_path: Path, layout: str, write: Callable[[Path], Written]
) -> None:
    written = write(tmp_path / "data")
    model = tiny_ulip_model if "point_cloud" in written.modalities else tiny_model
    data = None if written.data is None else tmp_path / "data" / written.data
    output = tmp_path / "out"
    found = evaluate("retrieval", model, data, layout, output, *written.options)
    rows = [embed(model, kind, side) for kind, side in zip(written.modalities, written.sides, strict=True)]
    check(found, "model", written, [rows[0] @ rows[1].T, rows[1] @ rows[0].T])
    counts = {NOUNS[kind]: len(side) for kind, side in zip(written.modalities, written.sides, strict=True)}
    assert counts.items() <= found["data"]["items"].items()
    assert "cannot be read" not in (output / "report.html").read_text()
    native = NATIVE.get(written.modalities[0])
    assert (f"{native} alone" in found["metrics"]) == (native is not None and written.modalities[1] == "text")
    if f"{native} alone" in found["metrics"]:
        alone = [
            embed_source(model, kind, side, native)
            for kind, side in zip(written.modalities, written.sides, strict=True)
        ]
        check(found, f"{native} alone", written, [alone[0] @ alone[1].T, alone[1] @ alone[0].T])


def test_texts_go_through_the_space_that_is_named(tiny_model: Path, tmp_path: Path) -> None:
    written = clotho(tmp_path / "data")
    found = evaluate("retrieval", tiny_model, tmp_path / "data", "clotho", tmp_path / "out", "--text-space", "clap")
    clips, texts = (
        embed(tiny_model, kind, side, space)
        for kind, side, space in zip(written.modalities, written.sides, (None, "clap"), strict=True)
    )
    check(found, "model", written, [clips @ texts.T, texts @ clips.T])


def softmax(cosines: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / temperature)
    shares: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return shares


def test_the_baselines_over_a_bank_are_those_of_their_formulas(tiny_model: Path, tmp_path: Path) -> None:
    written = ave(tmp_path / "data")
    bank = CAPTIONS[::2]
    write_text(tmp_path / "bank.txt", "\n".join(bank))
    more = ("--bank", str(tmp_path / "bank.txt"))
    found = evaluate("retrieval", tiny_model, tmp_path / "data", "ave", tmp_path / "out", *more)
    names = [name.replace("_", " ") for name in sorted(KINDS)]
    of_space = found["settings"]["posterior_temperatures"]
    sides = [
        {
            "items": embed_source(tiny_model, kind, items, space),
            "bank": embed_source(tiny_model, "text", bank, space),
            "names": embed_source(tiny_model, "text", names, space),
            "temperature": of_space[space],
        }
        for kind, items, space in zip(written.modalities, written.sides, ("clap", "clip"), strict=True)
    ]
    scores: dict[str, list[np.ndarray]] = {}
    for one, other in (sides, sides[::-1]):
        a, b, width = one["items"], other["items"], one["items"].shape[1]
        cosines = a @ one["bank"].T
        scores.setdefault("one-way bridge", []).append(
            unit(softmax(cosines, BRIDGE_TEMPERATURE) @ other["bank"]) @ b.T
        )
        posteriors = softmax(cosines, one["temperature"]), softmax(b @ other["bank"].T, other["temperature"])
        scores.setdefault("posterior matching", []).append(posteriors[0] @ posteriors[1].T)
        named = other["names"][(a @ one["names"].T).argmax(axis=1)]
        scores.setdefault("closed cascade", []).append(named @ b.T)
        ridge = Ridge(0.01 * len(bank) / width, fit_intercept=False).fit(one["bank"], other["bank"])
        scores.setdefault("ridge", []).append(unit(ridge.predict(a)) @ b.T)
    there, back = scores["one-way bridge"]
    scores["two-way bridge"] = [(there + back.T) / 2, (back + there.T) / 2]
    # The other two are another trained layer, and a rotation that texts so much alike leave to rounding.
    assert {*scores, "chance", "linear map", "procrustes", "model"} == set(found["metrics"])
    for method, own in scores.items():
        check(found, method, written, own)
