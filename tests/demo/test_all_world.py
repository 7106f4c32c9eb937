from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from cmcr_hf.demo.all_world import write_all_world
from cmcr_hf.demo.captions import concept_phrase
from cmcr_hf.demo.retrain_all import drawn_or_rendered
from cmcr_hf.demo.sounding_solids import BUILDERS, sample_cloud
from cmcr_hf.demo.synthesis import SAMPLING_RATE
from cmcr_hf.demo.world import stream

COUNTS = {"images": 2, "sounds": 1, "clouds": 2, "texts": 6}
SMALL = {**COUNTS, **{f"test_{name}": 1 for name in ("images", "sounds", "clouds")}, "test_texts": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all_world(tmp_path_factory.mktemp("all") / "world", seed=7, **SMALL)


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_file_is_there_and_no_temporary_one(world: Path) -> None:
    names = sorted(path.relative_to(world).as_posix() for path in world.rglob("*") if path.is_file())
    expected = ["names.csv", "test_texts.csv", "texts.csv", "world.json"]
    for concept in BUILDERS:
        for name, suffix in (("images", "png"), ("sounds", "wav"), ("clouds", "npy")):
            expected += [f"{name}/{concept}/000{index}.{suffix}" for index in range(SMALL[name])]
            expected.append(f"test_{name}/{concept}/0000.{suffix}")
    assert names == sorted(expected)


def test_items_are_of_streams_of_their_own(world: Path) -> None:
    with Image.open(world / "images" / "bell" / "0001.png") as picture:
        expected = drawn_or_rendered("bell", stream(7, "images", "bell", 1))
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
    cloud = np.load(world / "test_clouds" / "car" / "0000.npy", allow_pickle=False)
    assert np.array_equal(cloud, sample_cloud("car", stream(7, "test_clouds", "car", 0)))
    assert soundfile.info(world / "sounds" / "dog" / "0000.wav").samplerate == SAMPLING_RATE


def test_no_text_that_tests_is_one_that_connects(world: Path) -> None:
    texts, test_texts = rows(world / "texts.csv")[1:], rows(world / "test_texts.csv")[1:]
    assert len(texts) == 12 * 6 and len(test_texts) == 12 * 4
    assert not {line for line, _ in texts} & {line for line, _ in test_texts}
    assert rows(world / "names.csv")[1:] == [[concept_phrase(concept), concept] for concept in BUILDERS]
