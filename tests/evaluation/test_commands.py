import argparse
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from cmcr_hf.evaluation.commands import _check_ours, _resamples, finish
from cmcr_hf.evaluation.labelled import label_items
from cmcr_hf.evaluation.localization_data import load_vgg_ss
from cmcr_hf.evaluation.pairs import load_pairs
from cmcr_hf.evaluation.result import EvaluationResult, Published
from cmcr_hf.training.data import Items
from cmcr_hf.training.recipe import DataSpec
from tests.evaluation.sounding_folders import write_vgg_ss


def make_result(chance: float = 0.5, size: int = 3, **data: object) -> EvaluationResult:
    return EvaluationResult(
        task="retrieval",
        title="a test",
        data={"name": "data", "items": {"pairs": size}, "fingerprint": {}, "licence": None, **data},
        model={"name": "model"},
        settings={"command": "cmcr", "resampled": "queries", "resamples": 20, "confidence": 0.95},
        metrics={"chance": {"there": {"R@1": chance}}, "model": {"there": {"R@1": 1.0}}},
        published=[Published("theirs", {"there": {"R@1": 0.3}}, "a paper", {"pairs": [3, 5000]})],
    )


def finished(folder: Path, result: EvaluationResult, limit: int | None = None) -> dict:
    finish(argparse.Namespace(output=folder, limit=limit), result)
    return json.loads((folder / "result.json").read_text())


def test_a_whole_data_set_stands_beside_what_others_published(tmp_path: Path) -> None:
    found = finished(tmp_path, make_result(missing=[], part=None))
    assert found["notes"] == [] and len(found["published"]) == 1 and found["data"]["part"] is None
    assert len(finished(tmp_path, make_result(size=5000))["published"]) == 1


@pytest.mark.parametrize(
    ("data", "limit", "said"),
    [
        (
            {"missing": ["a.wav", "b.wav"], "empty": 2},
            None,
            "Left out: 2 items (no such file, for example a.wav), 2 rows (an empty cell).",
        ),
        ({"part": "fold 1"}, None, "This is fold 1, which published numbers are not of, so none stand here."),
        (
            {"missing": ["a.wav"], "unreadable": ["b.wav", "c.wav"]},
            None,
            "Left out: 1 item (no such file, for example a.wav), 2 items (cannot be read, for example b.wav).",
        ),
        ({}, 3, "Published numbers are of the whole data set, so none stand here."),
        ({"size": 2}, 2, "Published numbers are of the whole data set, so none stand here."),
        (
            {"size": 1200},
            None,
            "This is 1,200 pairs in place of 3 or 5,000, which published numbers are not of, so none stand here.",
        ),
    ],
)
def test_a_part_of_a_data_set_is_called_so_and_stands_beside_nothing(
    tmp_path: Path, data: dict, limit: int | None, said: str
) -> None:
    found = finished(tmp_path, make_result(**data), limit)
    assert said in found["notes"] and found["published"] == []


def test_where_the_page_cannot_be_written_there_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, result: EvaluationResult) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("cmcr_hf.pages.evaluation.write_evaluation_page", full)
    with pytest.raises(OSError, match="No space left"):
        finished(tmp_path, make_result())
    assert list(tmp_path.iterdir()) == []


def test_a_task_with_one_answer_is_called_so(tmp_path: Path) -> None:
    assert "Chance is 1" in finished(tmp_path, make_result(chance=1.0))["notes"][0]


@pytest.mark.parametrize(("name", "text"), [("report.html", "my thesis"), ("result.json", "[1]")])
def test_files_of_somebody_else_are_not_written_over(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} was not written by an evaluation and would be lost"):
        _check_ours(tmp_path)


def test_files_of_an_evaluation_are_written_over(tmp_path: Path) -> None:
    finished(tmp_path, make_result())
    _check_ours(tmp_path)


@pytest.mark.parametrize("value", ["1", "19", "100000000"])
def test_numbers_of_resamples_that_say_nothing_or_take_too_long_are_refused(value: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither 0 nor 20 to 100000"):
        _resamples(value)


def test_fewer_items_are_told_apart_from_no_fewer_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    every, few = (Items([DataSpec(folder=str(tmp_path), label="parent", limit=n)], "image", Path()) for n in (None, 1))
    found = label_items("set", few, every=every)
    assert len(found.labels) == 1 and found.classes == ["cat", "dog"]


def test_nan_in_a_cell_is_an_empty_one(tmp_path: Path) -> None:
    rows = [{"image": "0.png", "text": "a dog"}, {"image": "1.png", "text": math.nan}]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_pairs(str(tmp_path / "pairs.jsonl"), [("image", "image"), ("text", "text")])
    assert found.empty == 1 and found.sizes == (1, 1)


@pytest.mark.parametrize("box", [[13, 13, 51, 51], [0.9, 0.1, 0.2, 0.5]])
def test_boxes_in_pixels_and_of_swapped_corners_are_refused(tmp_path: Path, box: list[float]) -> None:
    folder = write_vgg_ss(tmp_path / "data")
    entries = json.loads((folder / "vggss.json").read_text())
    entries[0]["bbox"] = [box]
    (folder / "vggss.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="expected parts of the picture from 0 to 1"):
        load_vgg_ss(folder)
