from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmcr_hf.evaluation.baselines import baseline_scores
from cmcr_hf.evaluation.result import (
    Case,
    EvaluationResult,
    Published,
    Shown,
    counted,
    first_of_classes,
    settings,
    shown,
)
from cmcr_hf.training.data import RemoteFile
from tests.media import RATE, encode_audio, encode_image, noise, picture


@pytest.fixture
def result(tmp_path: Path) -> EvaluationResult:
    image = tmp_path / "media" / "dog.png"
    image.parent.mkdir()
    image.write_bytes(encode_image(Image.fromarray(picture())))
    clip = tmp_path / "media" / "bark.wav"
    clip.write_bytes(encode_audio(noise(RATE // 4)))
    found = [
        Shown("image", image, str(image), "dog", 0.9, True),
        Shown("text", "a <b>cat</b>", "000001", None, -0.2, False),
        Shown("point_cloud", np.eye(3), "cloud"),
        Shown("audio", tmp_path / "gone.wav", "gone.wav"),
        Shown("image", RemoteFile("hf://datasets/pets/dog.png", image.read_bytes), "dog.png"),
    ]
    case = Case(Shown("audio", clip, "bark.wav", "dog"), 0.5, found, Image.new("RGB", (2000, 1000)), "marked by boxes")
    return EvaluationResult(
        task="retrieval",
        title="audio-image retrieval on pets",
        data={"name": "pets", "items": {"clips": 1200}, "fingerprint": {"audio": "abc"}, "licence": None},
        model={"name": "model", "sources": {"clip": {"id": "clip", "revision": None}}},
        settings=settings(
            ["evaluate", "retrieval", "--data", str(tmp_path / "pets.csv"), f"--model={tmp_path}/model"],
            seed=3,
            resamples=100,
            resampled="queries",
            prompts=["a {}"],
        ),
        metrics={
            "chance": {"audio_to_image": {"R@1": 0.25, "median rank": 2.5}},
            "model": {"audio_to_image": {"R@1": 0.75, "median rank": 1.0}, "mean": {"R@1": 0.5}},
        },
        intervals={"model": {"audio_to_image": {"R@1": (0.5, 0.875), "median rank": (1.0, 12.0)}}},
        published=[Published("ImageBind", {"mean": {"R@1": 0.1482}}, "a paper, table 3")],
        best=[case],
        notes=["Below a bridge."],
    )


def test_the_text_has_every_number_with_its_interval(result: EvaluationResult) -> None:
    assert result.format() == (
        "audio-image retrieval on pets: 1,200 clips\n\n"
        "audio → image  R@1                   median rank\n"
        "chance         0.250                 2.5\n"
        "model          0.750 [0.500, 0.875]  1.0 [1.0, 12.0]\n\n"
        "mean                   R@1\n"
        "model                  0.500\n"
        "ImageBind (published)  0.148\n\n"
        "In brackets: 95 % intervals over queries, by 100 resamples.\n\n"
        "Published numbers: a paper, table 3\n\n"
        "Below a bridge."
    )


def test_what_is_written_says_how_to_run_it_again_and_names_no_machine(
    result: EvaluationResult, tmp_path: Path
) -> None:
    result.write(tmp_path / "out")
    text = (tmp_path / "out" / "result.json").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert str(tmp_path) not in text + page
    document = json.loads(text)
    assert document["settings"]["command"] == "cmcr evaluate retrieval --data pets.csv --model=model"
    assert document["settings"]["seed"] == 3
    assert set(document["settings"]["versions"]) >= {"python", "torch", "transformers", "cmcr-hf"}
    assert document["settings"]["versions"]["pillow"] == importlib.metadata.version("pillow")
    assert document["intervals"]["model"]["audio_to_image"]["R@1"] == [0.5, 0.875]
    assert document["published"][0]["source"] == "a paper, table 3"
    assert document["best"][0]["found"][0] == {
        "modality": "image",
        "name": "dog.png",
        "label": "dog",
        "score": 0.9,
        "right": True,
    }
    assert document["best"][0]["found"][1]["text"] == "a <b>cat</b>"


def test_versions_are_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmcr_hf.evaluation.result.DECODERS", ("pillow", "no-such-package"))
    versions = settings([], seed=0, resamples=0, resampled="queries")["versions"]
    assert "pillow" in versions and "no-such-package" not in versions


def test_the_page_holds_its_pictures_and_sounds_and_escapes_texts(result: EvaluationResult, tmp_path: Path) -> None:
    result.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:audio/mpeg;base64,') == 1
    # The picture, the fetched one, the drawn cloud and the overlay.
    assert page.count('src="data:image/jpeg;base64,') == 4
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert "gone.wav: not shown, cannot be read" in page
    assert "published, not measured here" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_result_gives_the_same_bytes(result: EvaluationResult, tmp_path: Path) -> None:
    for name in ("one", "two"):
        result.write(tmp_path / name)
    for name in ("result.json", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_page_shows_so_many_cases_at_most(result: EvaluationResult, tmp_path: Path) -> None:
    result.best = [*result.best] * 30
    result.write(tmp_path)
    assert (tmp_path / "report.html").read_text().count("<article") == 8
    assert len(json.loads((tmp_path / "result.json").read_text())["best"]) == 30


def test_one_is_counted_with_a_singular(result: EvaluationResult, tmp_path: Path) -> None:
    words = [counted(1, "classes"), counted(1, "images"), counted(1, "non-sounding"), counted(1200, "clips")]
    assert words == ["1 class", "1 image", "1 non-sounding", "1,200 clips"]
    result.data = {**result.data, "items": {"clips": 1, "classes": 2}}
    assert result.format().startswith("audio-image retrieval on pets: 1 clip, 2 classes\n")
    result.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<li><strong>1</strong> clip</li>" in page and "<li><strong>2</strong> classes</li>" in page
    assert json.loads((tmp_path / "result.json").read_text())["data"]["items"] == {"clips": 1, "classes": 2}


def test_of_a_class_no_more_than_two_are_taken_while_there_are_others() -> None:
    rows = [10, 11, 12, 13, 14, 15, 16]
    own = dict(zip(rows, ["dog", "dog", "dog", "dog", "cat", None, None], strict=True)).get
    assert first_of_classes(rows, own, 5) == [10, 11, 14, 15, 16]
    assert first_of_classes(rows, own, 6) == [10, 11, 12, 14, 15, 16]
    assert first_of_classes(rows[:4], own, 3) == [10, 11, 12]
    assert first_of_classes(rows, lambda row: None, 3) == [10, 11, 12]


def test_the_page_says_what_every_baseline_of_a_table_is(result: EvaluationResult, tmp_path: Path) -> None:
    rows = torch.eye(3)
    names = baseline_scores(rows, rows, rows, rows, rows, rows)
    every = ["chance", *names, "clap alone", "whole picture", "centre"]
    result.metrics = {name: {"there": {"R@1": 0.5}} for name in [*every, "model"]}
    result.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<dt>(.*?)</dt>", page) == every
    assert "Knows the classes, and that there are no others; no pairs." in page
    result.metrics = {"model": {"there": {"R@1": 0.5}}}
    result.write(tmp_path)
    assert "<dl" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b/model", "model"),
        ("runs/model", "runs/model"),
        ("--data=/a/b", "--data=b"),
        ("clip=/a/stores/clip", "clip=clip"),
        ("--limit=3", "--limit=3"),
    ],
)
def test_names_are_shown_without_what_they_tell_of_a_machine(given: str, expected: str) -> None:
    assert shown(given) == expected
