from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmcr_hf.demo.shape_captions import held_out_text, memory_text
from cmcr_hf.demo.shapes_world import write_shapes_world
from cmcr_hf.demo.solids import KINDS, render, sample_cloud
from cmcr_hf.demo.world import distinct, stream, write_world

SMALL = {"images": 2, "clouds": 2, "texts": 5, "test_images": 1, "test_clouds": 1, "test_texts": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes_world(tmp_path_factory.mktemp("shapes") / "world", seed=7, **SMALL)


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_file_is_there_and_no_temporary_one(world: Path) -> None:
    names = sorted(path.relative_to(world).as_posix() for path in world.rglob("*") if path.is_file())
    expected = ["names.csv", "test_texts.csv", "texts.csv", "world.json"]
    for kind in KINDS:
        expected += [f"images/{kind}/000{index}.png" for index in range(2)]
        expected += [f"clouds/{kind}/000{index}.npy" for index in range(2)]
        expected += [f"test_images/{kind}/0000.png", f"test_clouds/{kind}/0000.npy"]
    assert names == sorted(expected)
    assert sorted(path.name for path in world.parent.iterdir()) == [".lock", "world"]


def test_a_picture_file_is_the_rendering_of_its_own_stream(world: Path) -> None:
    with Image.open(world / "images" / "chair" / "0001.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(render("chair", stream(7, "images", "chair", 1))))


def test_a_cloud_file_is_float32_without_pickle_of_its_own_stream(world: Path) -> None:
    cloud = np.load(world / "test_clouds" / "mug" / "0000.npy", allow_pickle=False)
    assert (cloud.shape, cloud.dtype) == ((512, 3), np.float32)
    assert np.array_equal(cloud, sample_cloud("mug", stream(7, "test_clouds", "mug", 0)))


def test_tables_hold_the_texts_and_one_name_a_kind(world: Path) -> None:
    texts, test_texts, names = (rows(world / f"{name}.csv") for name in ("texts", "test_texts", "names"))
    assert texts[0] == test_texts[0] == names[0] == ["text", "concept"]
    memory = distinct(memory_text, "aeroplane", 5, seed=7, split="texts")
    held_out = distinct(held_out_text, "aeroplane", 3, seed=7, split="test_texts")
    assert texts[1:6] == [[line, "aeroplane"] for line in memory]
    assert test_texts[1:4] == [[line, "aeroplane"] for line in held_out]
    assert [row[1] for row in names[1:]] == list(KINDS)
    assert ["a table", "table"] in names


def test_the_marker_says_that_the_world_is_synthetic(world: Path) -> None:
    marker = json.loads((world / "world.json").read_text(encoding="utf-8"))
    assert marker["synthetic"] is True
    assert (marker["seed"], marker["concepts"], marker["counts"]) == (7, list(KINDS), SMALL)


def test_a_world_of_the_same_description_is_kept_and_one_of_another_is_an_error(world: Path) -> None:
    path = world / "clouds" / "ball" / "0000.npy"
    before = path.stat().st_mtime_ns
    assert write_shapes_world(world, seed=7, **SMALL) == world
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds a world of another description"):
        write_shapes_world(world, seed=8, **SMALL)
    with pytest.raises(ValueError, match="holds a world of another description"):
        write_world(world, seed=7)


def test_a_count_below_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 0\. Pass test_clouds=1"):
        write_shapes_world(tmp_path / "world", test_clouds=0)


def test_nothing_is_left_of_a_world_whose_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cmcr_hf.demo.shapes_world.np.save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shapes_world(tmp_path / "world", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_world_that_is_written_again_counts_as_the_same_data(world: Path, tmp_path: Path) -> None:
    def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    assert listing(write_shapes_world(tmp_path / "again", seed=7, **SMALL)) == listing(world)
