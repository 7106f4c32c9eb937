"""Zero-shot classification from files to numbers, compared with the model's own features and scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from tokenizers import Regex, models, pre_tokenizers

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.evaluation.modelnet40 import CLASSES
from cmcr_hf.modeling.point_cloud_loading_cmcr import load_point_cloud
from tests.conftest import save_tiny_clip, tiny_tokenizer
from tests.evaluation.by_hand import (
    embed,
    evaluate,
    resampled,
    unit,
    write_clips,
    write_data_set,
    write_photos,
    write_text,
)
from tests.evaluation.test_modelnet40 import write_h5
from tests.evaluation.test_zero_shot import write_modelnet40
from tests.media import RATE, chord, cloud, encode_audio

KINDS = ("train", "dog", "loud_bell", "sea", "cat", "bell", "small_dog")
# The tiny CLIP reads a text up to the word, or the letter, of the largest number, which is the last one here.
TEMPLATES = ("the {} of", "red {} sound of")
LETTER_TEMPLATES = ("{}~", "a {}~")


@dataclass
class Written:
    """What a test wrote, in the order of the layout, and the classes of it.

    Args:
        items: paths, encoded files or arrays.
        labels: of each item, places among the names.
        names: of the classes as prompts say them, in the order of the classes.
    """

    modality: str
    items: Sequence[Any]
    labels: Sequence[set[int]]
    names: Sequence[str]
    data: str = ""
    options: tuple[str, ...] = ()


def of_kinds(count: int) -> tuple[list[str], list[set[int]], list[str]]:
    """Return the kinds of items, their places and the names of all."""
    kinds = [KINDS[row * row % 11 % len(KINDS)] if row >= len(KINDS) else KINDS[row] for row in range(count)]
    names = sorted(KINDS)
    return kinds, [{names.index(kind)} for kind in kinds], [name.replace("_", " ") for name in names]


def esc_50(folder: Path) -> Written:
    kinds, labels, names = of_kinds(15)
    clips = write_clips(folder / "audio", [f"{1 + row % 5}-{100210 - row}-A-{row % 7}.wav" for row in range(15)])
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    rows += [f"{clip.name},{clip.name[0]},0,{kind},False,0,A" for kind, clip in zip(kinds, clips, strict=True)]
    write_text(folder / "meta" / "esc50.csv", "\n".join(rows))
    return Written("audio", clips, labels, names)


def folder_of_classes(folder: Path) -> Written:
    kinds, _, names = of_kinds(15)
    write_photos(folder, [f"{kind}/{row}.jpg" for row, kind in enumerate(kinds)])
    photos = sorted(folder.glob("*/*"))
    labels = [{names.index(photo.parent.name.replace("_", " "))} for photo in photos]
    return Written("image", photos, labels, names, "", ("--modality", "image"))


def imagenet(folder: Path) -> Written:
    ids = [f"n{2084071 + 7 * place:08}" for place in range(len(KINDS))]
    lines = [f"{name} {kind.replace('_', ' ')}, hound" for name, kind in zip(ids, KINDS, strict=True)]
    items, labels = [], []
    for place, name in enumerate(ids):
        items += write_photos(folder / "val" / name, [f"ILSVRC2012_val_{10 * place + row:08}.JPEG" for row in (0, 1)])
        labels += [{place}] * 2
    write_text(folder / "LOC_synset_mapping.txt", "\n".join(lines))
    return Written("image", items, labels, [kind.replace("_", " ") for kind in KINDS], "val")


def audioset(folder: Path) -> Written:
    names = [f"{37 * row % 13:02}-Video{row:03}" for row in range(10)]
    labels = [{row % 4, row * row % 7 % 5} for row in range(10)]
    # The clip of the last segment is not there, and nothing else has the sixth class.
    labels[9] = {5, 0}
    lines = ["# Segments csv created Sun Mar  5 10:54:25 2017", "# num_ytids=10", "# YTID, start_seconds, end_seconds"]
    for name, own in zip(names, labels, strict=True):
        lines.append(f'{name}, 30.000, 40.000, "{",".join(f"/m/{place}" for place in sorted(own))}"')
    write_text(folder / "eval_segments.csv", "\n".join(lines))
    words = [kind.replace("_", " ") for kind in KINDS[:6]]
    rows = ["index,mid,display_name", *(f'{place},/m/{place},"{word}"' for place, word in enumerate(words))]
    write_text(folder / "class_labels_indices.csv", "\n".join(rows))
    clips = write_clips(folder / "eval", [f"Y{name}.wav" for name in names[:9]])
    return Written("audio", clips, labels[:9], words)


def jsonl_table(folder: Path) -> Written:
    kinds, labels, names = of_kinds(15)
    photos = write_photos(folder / "photos", [f"{37 * row % 16}.jpg" for row in range(15)])
    rows = [{"kind": kind, "file": f"photos/{photo.name}"} for kind, photo in zip(kinds, photos, strict=True)]
    write_text(folder / "items.jsonl", "\n".join(map(json.dumps, rows)))
    options = ("--modality", "image", "--column", "file", "--label", "kind")
    return Written("image", photos, labels, names, "items.jsonl", options)


def parquet_table(folder: Path) -> Written:
    kinds, labels, names = of_kinds(15)
    clips = write_clips(folder, [f"{37 * row % 16}.wav" for row in range(15)])
    rows = [{"clip": clip.name, "kind": kind} for kind, clip in zip(kinds, clips, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "items.parquet")
    return Written("audio", clips, labels, names, "items.parquet", ("--modality", "audio", "--label", "kind"))


def data_set_of_clips(folder: Path) -> Written:
    kinds, labels, names = of_kinds(15)
    clips = [encode_audio(chord(RATE // 4, seed=row)) for row in range(15)]
    features = datasets.Features({"kind": datasets.ClassLabel(names=list(KINDS)), "sound": datasets.Audio()})
    columns = {
        "kind": [KINDS.index(kind) for kind in kinds],
        "sound": [{"bytes": clip, "path": None} for clip in clips],
    }
    write_data_set(folder / "set", columns, features)
    options = ("--modality", "audio", "--column", "sound", "--label", "kind", "--split", "test")
    return Written("audio", clips, labels, names, "set", options)


def data_set_of_clouds(folder: Path) -> Written:
    kinds, labels, names = of_kinds(15)
    clouds = [cloud(row) for row in range(15)]
    features = datasets.Features({"points": datasets.Array2D((64, 3), "float32"), "kind": datasets.Value("string")})
    columns = {"points": [points.tolist() for points in clouds], "kind": kinds}
    (folder / "set").mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "set" / "test-0.parquet")
    options = ("--modality", "point_cloud", "--column", "points", "--label", "kind", "--split", "test")
    return Written("point_cloud", clouds, labels, names, "set", options)


def modelnet40_meshes(folder: Path) -> Written:
    write_modelnet40(folder)
    clouds = [load_point_cloud(folder / name / "test" / "1.off", normalize=True) for name in CLASSES]
    # The meshes have z up.
    turned = [np.stack([x, z, -y], axis=1) for x, y, z in (points.T for points in clouds)]
    names = [name.replace("_", " ") for name in CLASSES]
    return Written("point_cloud", turned, [{place} for place in range(40)], names)


def modelnet40(folder: Path) -> Written:
    """Clouds that are neither centred nor scaled, in two files, of which the list names the second one first."""
    folder.mkdir()
    clouds = np.stack([cloud(row) * 3 + 2 for row in range(45)])
    classes = np.arange(45) * 7 % 40
    write_text(folder / "shape_names.txt", "\n".join(CLASSES) + "\n")
    write_text(folder / "test_files.txt", "\n".join(f"data/h5/ply_data_test{number}.h5" for number in (1, 0)))
    for number, rows in ((1, slice(0, 30)), (0, slice(30, 45))):
        write_h5(folder / f"ply_data_test{number}.h5", clouds[rows], classes[rows, None].astype(np.uint8))
    centred = clouds - clouds.mean(axis=1, keepdims=True)
    scaled = centred / np.linalg.norm(centred, axis=2).max(axis=1)[:, None, None]
    names = [name.replace("_", " ") for name in CLASSES]
    return Written("point_cloud", list(scaled.astype(np.float32)), [{place} for place in classes.tolist()], names)


@pytest.fixture(scope="module")
def letters_model(tiny_ulip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP and ULIP with a random connector, whose words are letters, so that no two names are one to it."""
    folder = tmp_path_factory.mktemp("letters")
    tokenizer = tiny_tokenizer(20)
    words = ["<pad>", "<s>", "</s>", "<unk>", " ", *map(chr, range(ord("a"), ord("z") + 1)), "~"]
    backend = tokenizer.backend_tokenizer
    backend.model = models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    clip = save_tiny_clip(folder / "clip")
    tokenizer.save_pretrained(clip)
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(clip, ulip=tiny_ulip, config={"projection_dim": 8})
    model.save_pretrained(folder / "model")
    CMCRProcessor.from_sources_pretrained(clip, ulip=tiny_ulip).save_pretrained(folder / "model")
    return folder / "model"


def scores_of(model: Path, written: Written, templates: Sequence[str]) -> np.ndarray:
    """Return the cosine of every item with the mean of the prompts of every class."""
    prompts = [template.format(name) for name in written.names for template in templates]
    classes = embed(model, "text", prompts).reshape(len(written.names), len(templates), -1)
    scores: np.ndarray = embed(model, written.modality, written.items) @ unit(classes.mean(axis=1)).T
    return scores


def check(found: dict[str, Any], numbers: dict[str, float], drawn: Callable[[np.ndarray], dict[str, float]]) -> None:
    """Compare the model's numbers, and the ends of their intervals with those of draws of items."""
    group = "zero-shot classification"
    assert found["metrics"]["model"][group] == pytest.approx(numbers, abs=1e-9)
    rows = np.arange(found["data"]["items"]["items"])
    for name in numbers:
        ends = resampled(rows, lambda own, name=name: drawn(own)[name], rows)
        assert found["intervals"]["model"][group][name] == pytest.approx(ends, abs=1e-9), name


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        ("esc-50", esc_50),
        ("imagenet", imagenet),
        ("folder", folder_of_classes),
        ("table", jsonl_table),
        ("table", parquet_table),
        ("table", data_set_of_clips),
        ("table", data_set_of_clouds),
        ("modelnet40", modelnet40),
        ("modelnet40", modelnet40_meshes),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_the_accuracy_of_every_layout_is_that_of_the_model(
    tiny_model: Path, letters_model: Path, tmp_path: Path, layout: str, write: Callable[[Path], Written]
) -> None:
    written = write(tmp_path / "data")
    letters = written.modality == "point_cloud"
    model, templates = (letters_model, LETTER_TEMPLATES) if letters else (tiny_model, TEMPLATES)
    more = (*written.options, *(word for template in templates for word in ("--template", template)))
    found = evaluate("classification", model, tmp_path / "data" / written.data, layout, tmp_path / "out", *more)
    scores, labels = scores_of(model, written, templates), np.array([min(own) for own in written.labels])
    margins = np.abs(scores - np.take_along_axis(scores, labels[:, None], axis=1))
    # Or rounding would decide.
    assert np.sort(margins, axis=1)[:, 1].min() > 1e-6

    def numbers(rows: np.ndarray) -> dict[str, float]:
        places = range(len(written.names))
        tops = {f"top-{k}": top_k_accuracy_score(labels[rows], scores[rows], k=k, labels=places) for k in (1, 3, 5)}
        return {**tops, "class mean": balanced_accuracy_score(labels[rows], scores[rows].argmax(axis=1))}

    assert found["settings"]["names"] == list(written.names)
    assert 0 < numbers(np.arange(len(labels)))["top-5"] < 1
    check(found, numbers(np.arange(len(labels))), numbers)


def test_the_average_precision_of_several_classes_is_that_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    written = audioset(tmp_path / "data")
    more = [word for template in TEMPLATES for word in ("--template", template)]
    found = evaluate("classification", tiny_model, tmp_path / "data", "audioset", tmp_path / "out", *more)
    scores = scores_of(tiny_model, written, TEMPLATES)
    assert np.diff(np.sort(scores, axis=0), axis=0).min() > 1e-6
    relevant = np.array([[place in own for place in range(len(written.names))] for own in written.labels])

    def numbers(rows: np.ndarray) -> dict[str, float]:
        there = relevant[rows].any(axis=0)
        hits = np.take_along_axis(relevant[rows], scores[rows].argmax(axis=1)[:, None], axis=1)
        precision = average_precision_score(relevant[rows][:, there], scores[rows][:, there], average="macro")
        return {"top-1": hits.mean(), "mAP": precision}

    check(found, numbers(np.arange(len(scores))), numbers)
