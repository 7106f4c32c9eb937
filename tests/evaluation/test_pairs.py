from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmcr_hf.evaluation.pairs import (
    PairedSet,
    load_audiocaps,
    load_ave,
    load_clotho,
    load_coco,
    load_pairs,
    load_sounding,
)
from cmcr_hf.training.data import Items
from tests.media import RATE, encode_audio, encode_image, noise, picture


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_clips(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        write(folder / f"{name}.wav", encode_audio(noise(RATE // 8, seed=seed)))


def write_pictures(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / f"{name}.jpg", encode_image(Image.fromarray(picture()), "JPEG"))


def named(data: PairedSet) -> list[tuple[str, str]]:
    """The pairs by the names of files and the words of texts."""
    sides = [
        [item.value if part.modality == "text" else Path(item.value).name for item in part] for part in data.sides
    ]
    assert data.pairs is not None
    return [(sides[0][first], sides[1][second]) for first, second in data.pairs.tolist()]


def classes_of(data: PairedSet, side: int) -> list[list[str]]:
    assert data.classes is not None
    return [[data.class_names[place] for place in row.nonzero()[:, 0].tolist()] for row in data.classes[side]]


# Tables and data sets


def test_rows_that_repeat_a_file_are_captions_of_one_item(tmp_path: Path) -> None:
    write_clips(tmp_path, "rain", "dog")
    write(tmp_path / "pairs.csv", "clip,caption\nrain.wav,it rains\ndog.wav,a dog\nrain.wav,wet\nrain.wav,\n,a dog\n")
    data = load_pairs(str(tmp_path / "pairs.csv"), [("audio", "clip"), ("text", "caption")])
    assert named(data) == [("rain.wav", "it rains"), ("dog.wav", "a dog"), ("rain.wav", "wet")]
    assert data.gold(0).tolist() == [[0, 2], [1, -1]]
    assert data.gold(1).tolist() == [[0], [1], [0]]
    # A row without a caption and one without a file.
    assert data.empty == 2
    assert data.record()["items"] == {"clips": 2, "texts": 3}


def test_equal_captions_stay_items_of_their_own(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a", "b")
    write(tmp_path / "p.jsonl", '{"image": "a.jpg", "text": "waves"}\n{"image": "b.jpg", "text": "waves"}\n')
    data = load_pairs(str(tmp_path / "p.jsonl"), [("image", "image"), ("text", "text")])
    assert data.gold(1).tolist() == [[0], [1]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_list_in_a_cell_is_several_captions(tmp_path: Path, suffix: str) -> None:
    write_pictures(tmp_path / "media", "a", "b")
    rows = [
        {"file": "a.jpg", "captions": ["one", "two"], "kind": "x"},
        {"file": "b.jpg", "captions": ["three"], "kind": "y"},
    ]
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        write(path, "\n".join(map(json.dumps, rows)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = [("image", "file"), ("text", "captions"), ("class", "kind")]
    data = load_pairs(str(path), columns, files=str(tmp_path / "media"))
    assert named(data) == [("a.jpg", "one"), ("a.jpg", "two"), ("b.jpg", "three")]
    assert classes_of(data, 1) == [["x"], ["x"], ["y"]]


def test_several_columns_are_several_captions_and_an_empty_one_is_none(tmp_path: Path) -> None:
    write_clips(tmp_path, "a", "b")
    write(tmp_path / "p.csv", "file,first,second\na.wav,one,two\nb.wav,three,\n")
    data = load_pairs(str(tmp_path / "p.csv"), [("audio", "file"), ("text", "first"), ("text", "second")])
    assert named(data) == [("a.wav", "one"), ("a.wav", "two"), ("b.wav", "three")]
    assert data.empty == 0


def test_pairs_of_media_may_belong_to_several_on_both_sides(tmp_path: Path) -> None:
    write_pictures(tmp_path, "p", "q")
    write_clips(tmp_path, "a", "b")
    write(tmp_path / "p.csv", "image,audio\np.jpg,a.wav\np.jpg,b.wav\nq.jpg,b.wav\nq.jpg,b.wav\n")
    data = load_pairs(str(tmp_path / "p.csv"), [("image", "image"), ("audio", "audio")])
    assert data.gold(0).tolist() == [[0, 1], [1, -1]]
    assert data.gold(1).tolist() == [[0, -1], [0, 1]]


def test_a_caption_of_several_files_of_a_row_is_one_text(tmp_path: Path) -> None:
    write_pictures(tmp_path, "left", "right")
    write(tmp_path / "p.csv", "one,two,text\nleft.jpg,right.jpg,a dog\n")
    data = load_pairs(str(tmp_path / "p.csv"), [("image", "one"), ("image", "two"), ("text", "text")])
    assert data.gold(1).tolist() == [[0, 1]]


def test_a_cell_that_names_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", '{"image": {"bytes": "..."}, "text": "a dog"}')
    with pytest.raises(ValueError, match="Expected a file name in image of row 0"):
        load_pairs(str(tmp_path / "p.jsonl"), [("image", "image"), ("text", "text")])


@pytest.mark.parametrize("empty", ["", " ", None, math.nan])
def test_an_empty_class_leaves_its_items_without_one_and_the_others_with_theirs(
    tmp_path: Path, empty: str | float | None
) -> None:
    write_clips(tmp_path, "a", "b", "c")
    rows = [{"f": "a.wav", "t": "1", "k": "dog"}, {"f": "b.wav", "t": "2", "k": empty}]
    rows.append({"f": "c.wav", "t": "3", "k": "cat"})
    write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    data = load_pairs(str(tmp_path / "p.jsonl"), [("audio", "f"), ("text", "t"), ("class", "k")])
    assert classes_of(data, 0) == classes_of(data, 1) == [["dog"], [], ["cat"]]
    assert data.classified(0).tolist() == data.classified(1).tolist() == [0, 2]
    said = "Measured by class without 1 clip and 1 text, which have no class that the other side has."
    assert data.notes() == [said]


def test_a_column_of_classes_without_any_is_refused(tmp_path: Path) -> None:
    write_clips(tmp_path, "a")
    write(tmp_path / "p.csv", "f,t,k\na.wav,1,\n")
    with pytest.raises(ValueError, match=r"The column 'k' of .* names no class in any row"):
        load_pairs(str(tmp_path / "p.csv"), [("audio", "f"), ("text", "t"), ("class", "k")])


def test_what_hangs_together_by_pairs_is_one_unit() -> None:
    pairs = torch.tensor([[0, 0], [1, 1], [1, 2], [2, 2], [3, 1], [4, 3], [4, 4]])
    data = PairedSet("set", (Items.listed("text", list("abcde")), Items.listed("text", list("12345"))), pairs)
    assert [unit.tolist() for unit in data.units()] == [[0, 1, 1, 1, 2], [0, 1, 1, 2, 2]]
    # A chain, whose ends are far from each other.
    chain = torch.tensor([[row, row + step] for row in range(40) for step in (0, 1)])
    ends = PairedSet("set", (data.sides[0], data.sides[1]), chain).units()
    assert not ends[0].any() and not ends[1].any()


def test_other_classes_have_another_fingerprint(tmp_path: Path) -> None:
    write_clips(tmp_path, "a", "b")
    found = []
    for kind in ("dog", "cat"):
        write(tmp_path / "p.csv", f"file,text,kind\na.wav,1,{kind}\nb.wav,2,bell\n")
        columns = [("audio", "file"), ("text", "text"), ("class", "kind")]
        found.append(load_pairs(str(tmp_path / "p.csv"), columns).record()["fingerprint"])
    assert found[0]["pairs"] == found[1]["pairs"]
    assert found[0]["classes"] != found[1]["classes"]


def test_the_limit_counts_items_and_not_their_captions(tmp_path: Path) -> None:
    write_clips(tmp_path, "a", "b")
    write(tmp_path / "p.csv", "file,text\na.wav,1\nb.wav,2\na.wav,3\n")
    for columns in ([("audio", "file"), ("text", "text")], [("text", "text"), ("audio", "file")]):
        data = load_pairs(str(tmp_path / "p.csv"), columns, limit=1)
        assert {tuple(sorted(pair)) for pair in named(data)} == {("1", "a.wav"), ("3", "a.wav")}


def test_rows_whose_file_is_not_there_are_left_out_and_the_files_named(tmp_path: Path) -> None:
    write_clips(tmp_path, "a", "b")
    write_pictures(tmp_path, "a")
    write(tmp_path / "p.csv", "one,two,image\na.wav,gone.wav,a.jpg\nb.wav,,lost.jpg\ngone.wav,,a.jpg\n")
    data = load_pairs(str(tmp_path / "p.csv"), [("audio", "one"), ("audio", "two"), ("image", "image")])
    assert named(data) == [("a.wav", "a.jpg")]
    assert data.missing == ["gone.wav", "lost.jpg"]
    assert data.record()["missing"] == ["gone.wav", "lost.jpg"]


def test_a_table_without_any_of_its_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", "file,text\naway.wav,1\n")
    with pytest.raises(ValueError, match=r"no pair in p.csv, but 1 item \(no such file, for example away.wav\)"):
        load_pairs(str(tmp_path / "p.csv"), [("audio", "file"), ("text", "text")])


def test_items_without_a_key_are_left_out_with_what_belongs_to_them_alone() -> None:
    sides = Items.listed("text", ["a", "b", "c"]), Items.listed("text", ["1", "2", "3", "4"])
    members = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    pairs = torch.tensor([[0, 0], [1, 1], [1, 2], [2, 3]])
    data = PairedSet("set", sides, pairs, (members, members[[0, 1, 1, 2]]), ["x", "y", "z"])
    rest, rows = data.readable([{"000000", "000001", "000002"}, {"000001", "000002", "000003"}])
    assert named(rest) == [("b", "2"), ("b", "3"), ("c", "4")]
    assert rest.unreadable == ["000000"] and rest.class_names == ["y", "z"]
    assert classes_of(rest, 1) == [["y"], ["y"], ["z"]]
    # Among the items with a key, of which the second side's have none before them.
    assert [row.tolist() for row in rows] == [[1, 2], [0, 1, 2]]
    by_class, _ = replace(data, pairs=None).readable([{"000001", "000002"}, {"000000", "000003"}])
    assert [[item.value for item in side] for side in by_class.sides] == [["c"], ["4"]]
    with pytest.raises(ValueError, match="no pair in set that can be read"):
        data.readable([{"000000"}, {"000001"}])


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", "file,text\na.wav,1\n")
    with pytest.raises(ValueError, match="has no column 'caption', it has file, text"):
        load_pairs(str(tmp_path / "p.csv"), [("audio", "file"), ("text", "caption")])


@pytest.mark.parametrize("columns", [[], [("audio", "a")], [("audio", "a"), ("video", "b")], [("text", "a")] * 2])
def test_columns_are_of_two_modalities(columns: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="Write --columns image=FILE"):
        load_pairs("p.csv", columns)


def test_a_data_set_pairs_the_cells_of_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encode_image(Image.fromarray(picture())), "path": None} for _ in range(3)]
    rows = {"picture": cells, "captions": [["one", "two"], ["three"], []], "kind": ["x", "y", "x"]}
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "kind": datasets.Value("string"),
        }
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).select([0, 1]).to_parquet(tmp_path / "set" / "train.parquet")
    columns = [("image", "picture"), ("text", "captions"), ("class", "kind")]
    data = load_pairs(str(tmp_path / "set"), columns)
    assert data.gold(0).tolist() == [[0, 1], [2, -1]]
    assert [item.value for item in data.sides[1]] == ["one", "two", "three"]
    assert classes_of(data, 0) == [["x"], ["y"]]
    one = load_pairs(str(tmp_path / "set"), columns, limit=1)
    assert one.gold(0).tolist() == [[0, 1]]


# Benchmarks


def test_ave_pairs_the_frame_and_the_sound_of_a_video_with_all_its_events(tmp_path: Path) -> None:
    # Two events of one video, one video that is gone.
    lines = ["Category&VideoID&Quality&StartTime&EndTime", "Church bell&RUhOCu3LNXM&good&0&10"]
    lines += ["Bark&--12UOziMF0&good&1&8", "Male speech, man speaking&--12UOziMF0&good&0&3", "Bark&away&good&0&10"]
    write(tmp_path / "Annotations.txt", "\n".join(lines) + "\n")
    write_clips(tmp_path / "audio", "RUhOCu3LNXM", "--12UOziMF0")
    write_pictures(tmp_path / "frames", "RUhOCu3LNXM", "--12UOziMF0", "away")
    data = load_ave(tmp_path)
    assert named(data) == [("RUhOCu3LNXM.wav", "RUhOCu3LNXM.jpg"), ("--12UOziMF0.wav", "--12UOziMF0.jpg")]
    assert classes_of(data, 0) == classes_of(data, 1) == [["Church bell"], ["Bark", "Male speech, man speaking"]]
    assert data.missing == ["away"]


@pytest.mark.parametrize("list_name", ["vggss.json", "vggss_test.csv", "names.csv"])
def test_vgg_ss_takes_its_json_or_a_list_of_names(tmp_path: Path, list_name: str) -> None:
    names = ["zpWuikVorYg_000032", "ORaz32CQ29k_000130"]
    write_clips(tmp_path / "audio", *names)
    write_pictures(tmp_path / "frames", *names)
    entries = [{"file": name, "class": "dog barking", "bbox": [[0, 0, 1, 1]]} for name in [*names, "away_000000"]]
    rows = "\n".join([*names, "away_000000"])
    write(tmp_path / list_name, json.dumps(entries) if list_name.endswith("json") else rows)
    chosen = tmp_path / list_name if list_name == "names.csv" else None
    data = load_sounding("VGG-SS", tmp_path, ["vggss.json", "vggss_test.csv"], "VGGSound", chosen=chosen)
    assert named(data) == [(f"{name}.wav", f"{name}.jpg") for name in names]
    assert (data.classes is not None) == (list_name == "vggss.json")
    assert data.missing == ["away_000000"]


def test_flickr_soundnet_takes_the_first_column_of_its_list(tmp_path: Path) -> None:
    write(tmp_path / "flickr_test.csv", "10000130166,202\n10007936344,0\n")
    write_clips(tmp_path / "audio", "10000130166", "10007936344")
    write_pictures(tmp_path / "frames", "10000130166", "10007936344")
    data = load_sounding("Flickr-SoundNet", tmp_path, ["flickr_test.csv"], "Flickr-SoundNet")
    assert named(data) == [("10000130166.wav", "10000130166.jpg"), ("10007936344.wav", "10007936344.jpg")]


def test_audiocaps_finds_its_clips_by_any_of_their_names(tmp_path: Path) -> None:
    rows = [
        "audiocap_id,youtube_id,start_time,caption",
        "103549,7fmOlUlwoNg,20,Constant rattling noise",
        '103541,7fmOlUlwoNg,20,"An engine, rattling"',
        "103548,6BJ455B1aAs,0,A rocket flies by",
        "103540,--0w1YA1Hm4,30,A vehicle",
        "103542,-BUWGM7qeUM,10,A dog",
        "103543,-BUWGM7qeUM,10,A dog barks",
        "103544,gone,10,A cat",
    ]
    write(tmp_path / "test.csv", "\n".join(rows))
    write_clips(tmp_path / "audio", "7fmOlUlwoNg", "6BJ455B1aAs_0", "Y--0w1YA1Hm4", "103543")
    data = load_audiocaps(tmp_path)
    assert data.gold(0).tolist() == [[0, 1], [2, -1], [3, -1], [4, 5]]
    assert named(data)[5] == ("103543.wav", "A dog barks")
    assert data.missing == ["gone"]


def test_clotho_has_five_captions_a_clip(tmp_path: Path) -> None:
    rows = ["file_name," + ",".join(f"caption_{number}" for number in range(1, 6))]
    rows += ["Santa Motor.wav,a machine,b,c,d,e", "gone.wav,a,b,c,d,e"]
    write(tmp_path / "clotho_captions_evaluation.csv", "\n".join(rows))
    write_clips(tmp_path / "evaluation", "Santa Motor")
    data = load_clotho(tmp_path)
    assert data.gold(0).tolist() == [[0, 1, 2, 3, 4]]
    assert [item.value for item in data.sides[1]] == ["a machine", "b", "c", "d", "e"]
    assert data.missing == ["gone.wav"]


def test_coco_reads_a_karpathy_split(tmp_path: Path) -> None:
    def image(number: int, split: str, *sentences: str) -> dict[str, object]:
        name = f"COCO_val2014_{number:012}.jpg"
        raw = [{"raw": sentence, "sentid": row} for row, sentence in enumerate(sentences)]
        return {"filepath": "val2014", "filename": name, "cocoid": number, "split": split, "sentences": raw}

    images = [image(391895, "test", "A man.", "A bike."), image(60623, "train", "Cake."), image(1, "test", "Gone.")]
    write(tmp_path / "dataset_coco.json", json.dumps({"dataset": "coco", "images": images}))
    write_pictures(tmp_path / "val2014", "COCO_val2014_000000391895", "COCO_val2014_000000060623")
    data = load_coco(tmp_path)
    assert named(data) == [(f"COCO_val2014_{391895:012}.jpg", text) for text in ("A man.", "A bike.")]
    assert data.missing == ["val2014/COCO_val2014_000000000001.jpg"]
    assert named(load_coco(tmp_path, "train")) == [("COCO_val2014_000000060623.jpg", "Cake.")]


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_reads_the_official_captions(tmp_path: Path, year: int) -> None:
    document = {
        "images": [{"id": 7, "file_name": "seven.jpg"}, {"id": 9, "file_name": "nine.jpg"}],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "Nine."},
            {"image_id": 7, "id": 2, "caption": "Seven."},
            {"image_id": 9, "id": 3, "caption": "Still nine."},
        ],
    }
    write(tmp_path / "annotations" / f"captions_val{year}.json", json.dumps(document))
    write_pictures(tmp_path / f"val{year}", "seven", "nine")
    assert named(load_coco(tmp_path)) == [("nine.jpg", "Nine."), ("seven.jpg", "Seven."), ("nine.jpg", "Still nine.")]


@pytest.mark.parametrize(
    ("load", "where"),
    [
        (load_ave, "github.com/YapengTian/AVE-ECCV18"),
        (load_audiocaps, "github.com/cdjkim/audiocaps"),
        (load_clotho, "zenodo.org/records/4783391"),
        (load_coco, "cocodataset.org/#download"),
        (
            lambda folder: load_sounding("VGG-SS", folder, ["vggss.json"], "VGGSound"),
            "github.com/hche11/Localizing-Visual-Sounds-the-Hard-Way",
        ),
    ],
)
def test_a_folder_without_the_data_is_told_where_to_get_it_and_what_to_hold(tmp_path: Path, load, where: str) -> None:
    with pytest.raises(ValueError, match="has to hold") as found:
        load(tmp_path)
    assert where in str(found.value)


def test_a_list_without_any_of_its_files_is_told_the_same(tmp_path: Path) -> None:
    write(tmp_path / "flickr_test.csv", "1,0\n2,0\n")
    with pytest.raises(ValueError, match=r"no pair in Flickr-SoundNet, but 2 items \(no such file.*frames/NAME"):
        load_sounding("Flickr-SoundNet", tmp_path, ["flickr_test.csv"], "Flickr-SoundNet")
