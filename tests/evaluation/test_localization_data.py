import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cmcr_hf.evaluation.boxes import MAP_SIZE, consensus_map
from cmcr_hf.evaluation.localization_data import (
    SILENT,
    SoundingPictures,
    load_extended_flickr_soundnet,
    load_extended_vgg_ss,
    load_flickr_soundnet,
    load_music,
    load_vgg_ss,
)
from tests.evaluation.sounding_folders import (
    FLICKR,
    MUSIC,
    VGG_SS,
    annotation,
    write_extended_flickr_soundnet,
    write_extended_vgg_ss,
    write_flickr_soundnet,
    write_music,
    write_vgg_ss,
)

LOADERS = {
    "vggss.json": load_vgg_ss,
    "flickr_test.csv": load_flickr_soundnet,
    "music_solo.json": load_music,
}


def test_vgg_ss_has_the_boxes_of_its_list(tmp_path: Path) -> None:
    data = load_vgg_ss(write_vgg_ss(tmp_path))
    assert [pair.key for pair in data.pairs] == list(VGG_SS)
    first, second = data.pairs[:2]
    assert (first.image, first.audio) == ("frames/zpWuikVorYg_000032.jpg", "audio/zpWuikVorYg_000032.wav")
    assert (first.label, first.video) == ("class 0", "zpWuikVorYg")
    assert second.boxes == ((0.12, 0.17, 0.6, 0.85), (0.76, 0.27, 0.98, 0.56))
    assert (data.consensus, data.missing) == (1, [])


def test_flickr_soundnet_has_the_boxes_of_three_annotators_for_the_pairs_of_its_list(tmp_path: Path) -> None:
    write_flickr_soundnet(tmp_path)
    # As spreadsheets save a table.
    (tmp_path / "flickr_test.csv").write_text("\ufeff" + (tmp_path / "flickr_test.csv").read_text(), "utf-8")
    data = load_flickr_soundnet(tmp_path)
    assert [pair.key for pair in data.pairs] == list(FLICKR)
    assert data.pairs[0].boxes == ((0.125, 0.125, 0.5, 1), (0.125, 0.125, 0.5, 0.875), (0, 0, 1, 1))
    assert data.consensus == 2
    # As the official code cuts: int(224 * 32 / 256) = 28.
    truth = consensus_map(data.pairs[0].boxes, data.consensus)
    assert (truth[27, 28], truth[28, 28], truth[28, 27]) == (0.5, 1, 0.5)


def test_music_has_one_box_by_width_and_height_and_the_sound_of_its_second(tmp_path: Path) -> None:
    data = load_music(write_music(tmp_path))
    assert [pair.key for pair in data.pairs] == list(MUSIC)
    assert data.pairs[2].boxes == ((0.25, 0.5, 0.75, 0.75),)
    assert [pair.audio for pair in data.pairs[:3]] == [
        "audio/9XoXQXCVUQY_000.wav",
        "audio/9XoXQXCVUQY_000.wav",
        "audio/9XoXQXCVUQY_001.wav",
    ]
    assert [pair.video for pair in data.pairs] == ["9XoXQXCVUQY"] * 3 + ["-_-TDDxoaAc"]
    (tmp_path / "music_solo_test.csv").write_text("9XoXQXCVUQY_000_00007,saxophone\n-_-TDDxoaAc_000_00000,cello\n")
    assert [pair.key for pair in load_music(tmp_path).pairs] == ["9XoXQXCVUQY_000_00007", "-_-TDDxoaAc_000_00000"]


def test_extended_data_sets_have_pairs_in_which_nothing_sounds(tmp_path: Path) -> None:
    data = load_extended_vgg_ss(write_extended_vgg_ss(tmp_path / "vgg"))
    assert [pair.label == SILENT for pair in data.pairs] == [False] * 4 + [True] * 3
    assert data.pairs[4].key == "9PmzQI8ZYpg_000147 9PmzQI8ZYpg_000147"
    assert (data.pairs[4].boxes, data.pairs[4].video, data.consensus) == ((), "9PmzQI8ZYpg", 1)
    data = load_extended_flickr_soundnet(write_extended_flickr_soundnet(tmp_path / "flickr"))
    assert [pair.label == SILENT for pair in data.pairs] == [False] * 3 + [True] * 3
    # The picture of a pair with the sound of another.
    assert (data.pairs[3].image, data.pairs[3].audio) == ("frames/10000130166.jpg", "audio/10007936344.wav")
    assert (data.pairs[3].video, data.consensus) == ("10000130166", 2)


def test_pairs_without_picture_or_sound_are_left_out_and_named(tmp_path: Path) -> None:
    write_vgg_ss(tmp_path)
    (tmp_path / "frames" / "zpWuikVorYg_000032.jpg").unlink()
    (tmp_path / "audio" / "ORaz32CQ29k_000130.wav").unlink()
    (tmp_path / "frames" / "-d1KR2BSfHM_000065.jpg").rename(tmp_path / "frames" / "-d1KR2BSfHM_000065.png")
    data = load_vgg_ss(tmp_path)
    assert [pair.image for pair in data.pairs] == ["frames/-d1KR2BSfHM_000065.png", "frames/M1P1xla8rg0_000000.jpg"]
    assert data.missing == ["zpWuikVorYg_000032", "ORaz32CQ29k_000130"]
    assert data.record()["missing"] == data.missing


@pytest.mark.parametrize("file", LOADERS)
def test_a_data_set_that_is_missing_says_where_to_get_it_and_what_it_looks_like(tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError) as caught:
        LOADERS[file](tmp_path)
    for part in (str(tmp_path), file, "github.com/", "frames/", "audio/"):
        assert part in str(caught.value)


def test_a_data_set_without_any_file_of_its_pairs_is_refused(tmp_path: Path) -> None:
    write_vgg_ss(tmp_path)
    for path in (tmp_path / "frames").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"frames/NAME\.jpg.*Of 4 pairs, none has both picture and sound"):
        load_vgg_ss(tmp_path)


def test_the_table_of_an_extended_data_set_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vggss_test_plus_silent\.csv of github\.com/stoneMo/SLAVC"):
        load_extended_vgg_ss(write_vgg_ss(tmp_path / "vgg"))
    write_extended_flickr_soundnet(tmp_path / "flickr")
    (tmp_path / "flickr" / "flickr_test_plus_silent.csv").write_text("video,audio,label\n1,2,sounding\n")
    with pytest.raises(ValueError, match=r"Of 0 pairs, none has both"):
        load_extended_flickr_soundnet(tmp_path / "flickr")


@pytest.mark.parametrize(
    ("load", "write", "file", "content", "message"),
    [
        (load_vgg_ss, write_vgg_ss, "vggss.json", "{", "Cannot read"),
        (load_vgg_ss, write_vgg_ss, "vggss.json", "{}", "Got a dict"),
        (load_vgg_ss, write_vgg_ss, "vggss.json", "[7]", "Got the entry 7"),
        (load_vgg_ss, write_vgg_ss, "vggss.json", json.dumps([{"file": "a"}]), "Got the entry"),
        (load_vgg_ss, write_vgg_ss, "vggss.json", json.dumps([{"file": "a", "bbox": [[0, 1]]}]), "'a', a box is"),
        (load_vgg_ss, write_vgg_ss, "vggss.json", json.dumps([{"file": "a", "bbox": [None]}]), "a box is None"),
        (load_vgg_ss, write_vgg_ss, "vggss.json", '[{"file": "a", "bbox": [[0, 0, 1, NaN]]}]', "a box is"),
        (load_music, write_music, "music_solo.json", json.dumps([{"file": "a", "class": "b"}]), "a box is None"),
        (load_flickr_soundnet, write_flickr_soundnet, "Annotations/10007936344.xml", "<a>", "Cannot read"),
        (
            load_flickr_soundnet,
            write_flickr_soundnet,
            "Annotations/10007936344.xml",
            annotation([[0, 0, 1]]).replace("<id>0</id>", ""),
            "a box is",
        ),
        (load_flickr_soundnet, write_flickr_soundnet, "flickr_test.csv", "123\n", r"Cannot read .*123\.xml"),
    ],
)
def test_a_damaged_file_is_named(
    tmp_path: Path,
    load: Callable[[Path], SoundingPictures],
    write: Callable[[Path], Path],
    file: str,
    content: str,
    message: str,
) -> None:
    (write(tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_box_without_area_leaves_nothing_to_find(tmp_path: Path) -> None:
    pairs = load_vgg_ss(write_vgg_ss(tmp_path)).pairs
    assert consensus_map(pairs[3].boxes).sum() == 0
    assert consensus_map(pairs[2].boxes).sum() == int(0.7 * MAP_SIZE) * (MAP_SIZE - int(0.1 * MAP_SIZE))
