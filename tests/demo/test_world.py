from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from cmcr_hf.demo.concepts import CONCEPTS
from cmcr_hf.demo.drawing import draw
from cmcr_hf.demo.synthesis import synthesise
from cmcr_hf.demo.world import distinct_texts, stream, write_world
from cmcr_hf.durable import locked

SMALL = {"images": 2, "sounds": 1, "texts": 5, "test_images": 1, "test_sounds": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("demo") / "world", seed=7, **SMALL)


def rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_file_is_there_and_no_temporary_one(world: Path) -> None:
    names = sorted(path.relative_to(world).as_posix() for path in world.rglob("*") if path.is_file())
    expected = ["names.csv", "texts.csv", "world.json"]
    for concept in CONCEPTS:
        expected += [f"images/{concept}/0000.png", f"images/{concept}/0001.png", f"sounds/{concept}/0000.wav"]
        expected += [f"test_images/{concept}/0000.png", f"test_sounds/{concept}/0000.wav"]
    assert names == sorted(expected)
    assert sorted(path.name for path in world.parent.iterdir()) == [".lock", "world"]


def test_a_picture_file_is_the_draw_of_its_own_stream(world: Path) -> None:
    with Image.open(world / "images" / "frog" / "0001.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(draw("frog", stream(7, "images", "frog", 1))))


def test_a_sound_file_is_16_khz_pcm16_of_its_own_stream(world: Path) -> None:
    path = world / "test_sounds" / "bell" / "0000.wav"
    info = soundfile.info(path)
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (16000, 1, "PCM_16", 32000)
    samples, _ = soundfile.read(path, dtype="float32")
    expected = synthesise("bell", stream(7, "test_sounds", "bell", 0))
    assert np.abs(samples - expected).max() < 1 / 32000


def test_tables_hold_the_texts_and_one_name_a_concept(world: Path) -> None:
    texts, names = rows(world / "texts.csv"), rows(world / "names.csv")
    assert texts[0] == names[0] == ["text", "concept"]
    assert texts[1:6] == [[line, "bee"] for line in distinct_texts("bee", 5, seed=7)]
    assert [row[1] for row in names[1:]] == list(CONCEPTS)
    assert ["a bell", "bell"] in names


def test_splits_seeds_and_concepts_have_streams_of_their_own() -> None:
    keys = [(0, "images", "bell", 0), (0, "test_images", "bell", 0), (1, "images", "bell", 0)]
    keys += [(0, "images", "bee", 0), (0, "images", "bell", 1), (0, "clip_training_images", "bell", 0)]
    assert len({int(stream(*key).integers(2**62)) for key in keys}) == len(keys)


def test_more_items_leave_the_first_ones_as_they_were() -> None:
    assert distinct_texts("dog", 30, seed=0)[:10] == distinct_texts("dog", 10, seed=0)
    assert len(set(distinct_texts("dog", 250, seed=0))) == 250


def test_more_texts_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmcr_hf.demo.world.text", lambda concept, generator: "a bell")
    with pytest.raises(ValueError, match=r"got 2\. Ask for fewer"):
        distinct_texts("bell", 2, seed=0)


def test_a_world_of_the_same_description_is_kept(world: Path) -> None:
    path = world / "images" / "bee" / "0000.png"
    before = path.stat().st_mtime_ns
    assert write_world(world, seed=7, **SMALL) == world
    assert path.stat().st_mtime_ns == before


def test_a_world_of_another_description_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmcr_hf.demo.world.CONCEPTS", {name: CONCEPTS[name] for name in ("bee", "frog")})
    folder = tmp_path / "world"
    write_world(folder, seed=1, **SMALL)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    before = (folder / "texts.csv").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="holds a world of another description"):
        write_world(folder, seed=2, **SMALL)
    assert (folder / "texts.csv").read_text(encoding="utf-8") == before
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "world"]


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_marker_is_another_description(tmp_path: Path, content: str) -> None:
    (tmp_path / "world.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="another description"):
        write_world(tmp_path, **SMALL)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="Pass another folder"):
        write_world(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_nothing_is_left_of_a_world_whose_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cmcr_hf.demo.world.soundfile.write", fail)
    with pytest.raises(OSError, match="disk full"):
        write_world(tmp_path / "world", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_count_below_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 0\. Pass images=1"):
        write_world(tmp_path / "world", images=0)


def test_a_world_that_is_written_again_counts_as_the_same_data(tmp_path: Path) -> None:
    def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 1), (again, 1), (other, 2)):
        write_world(folder, seed=seed, **SMALL)
    assert listing(first) == listing(again)
    # A sound of another seed is as long, so that its change time has to differ.
    name = "sounds/bee/0000.wav"
    assert listing(first)[name][0] != listing(other)[name][0]


def test_what_a_killed_run_left_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".world.tmp" / "images").mkdir(parents=True)
    (tmp_path / ".world.tmp" / "images" / "torn.png").write_bytes(b"torn")
    world = write_world(tmp_path / "world", **SMALL)
    assert not (world / "images" / "torn.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "world"]


def test_a_world_is_not_written_where_another_run_is(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match=f"another run is using {tmp_path}"):
        write_world(tmp_path / "world", **SMALL)
    assert not (tmp_path / "world").exists()
