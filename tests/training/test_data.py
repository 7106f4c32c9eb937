import io
import json
import os
import tracemalloc
import zipfile

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.training import data
from cmcr_hf.training.data import Item, Items, RemoteFile
from cmcr_hf.training.recipe import DataSpec


def texts(root, **spec):
    return Items([DataSpec(**spec)], "text", root)


def values(items):
    return [item.value for item in items]


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path)


@pytest.fixture
def pictures(tmp_path):
    for name in ("b/dog.png", "a/cat.PNG", "a/zebra.jpg"):
        write_image(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "a" / "notes.txt").write_text("no picture")
    return tmp_path


# Lists


def test_items_that_are_made_of_a_file_are_other_ones_once_it_or_their_making_changes(tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(b"0123")
    rows = [
        Item(str(row), RemoteFile(str(path), lambda row=row: path.read_bytes()[row : row + 1])) for row in range(4)
    ]

    def made(version="first"):
        return Items.made("audio", rows, version)

    before = made()
    assert before.fingerprint == made().fingerprint != made("second").fingerprint
    assert [item.value.fetch() for item in before] == [b"0", b"1", b"2", b"3"]
    parts = before.parts(3)
    assert [[item.key for item in part.read(1)] for part in parts] == [["1", "2"], []]
    path.write_bytes(b"01234")
    assert made().fingerprint != before.fingerprint


# Folders


def test_a_folder_is_read_in_sorted_order_and_other_files_are_passed_over(pictures):
    items = list(Items([DataSpec(folder="pictures")], "image", pictures))
    assert [item.key for item in items] == ["a/cat.PNG", "a/zebra.jpg", "b/dog.png"]
    assert items[0].value == pictures / "pictures" / "a" / "cat.PNG"
    assert items[0].label is None


def test_a_pattern_selects_files(pictures):
    items = Items([DataSpec(folder="pictures", pattern="*/*.png")], "image", pictures)
    assert [item.key for item in items] == ["b/dog.png"]


def test_dot_files_are_passed_over_unless_a_pattern_names_them(pictures):
    for name in ("a/._cat.jpeg", ".thumbnails/dog.png"):
        write_image(pictures / "pictures" / name)
    assert [item.key for item in Items([DataSpec(folder="pictures")], "image", pictures)] == [
        "a/cat.PNG",
        "a/zebra.jpg",
        "b/dog.png",
    ]
    named = Items([DataSpec(folder="pictures", pattern=".thumbnails/*")], "image", pictures)
    assert [item.key for item in named] == [".thumbnails/dog.png"]


def test_a_hidden_folder_may_be_named_itself(tmp_path):
    write_image(tmp_path / ".cache" / "dog.png")
    assert [item.key for item in Items([DataSpec(folder=".cache")], "image", tmp_path)] == ["dog.png"]


@pytest.mark.parametrize("pattern", [None, "a/*.jpg"])
def test_a_link_that_leads_nowhere_is_named(pictures, pattern):
    (pictures / "pictures" / "a" / "lost.jpg").symlink_to(pictures / "absent.jpg")
    with pytest.raises(ValueError, match=r"The link .*a/lost.jpg leads to a file that is not there"):
        Items([DataSpec(folder="pictures", pattern=pattern)], "image", pictures)


def test_a_link_to_a_file_is_an_item(pictures):
    (pictures / "pictures" / "b" / "horse.jpg").symlink_to(pictures / "pictures" / "a" / "zebra.jpg")
    assert "b/horse.jpg" in [item.key for item in Items([DataSpec(folder="pictures")], "image", pictures)]


@pytest.mark.parametrize(("label", "expected"), [("parent", ["a", "a", "b"]), ("stem", ["cat", "zebra", "dog"])])
def test_the_class_of_a_file_is_its_folder_or_its_name(pictures, label, expected):
    items = Items([DataSpec(folder="pictures", label=label)], "image", pictures)
    assert [item.label for item in items] == expected


def test_several_entries_follow_one_another(pictures):
    specs = [DataSpec(folder="pictures/b"), DataSpec(folder="pictures/a", limit=1)]
    items = Items(specs, "image", pictures)
    assert [item.key for item in items] == ["dog.png", "cat.PNG"]
    assert len(items) == 2


def test_iterating_starts_anew_each_time(pictures):
    items = Items([DataSpec(folder="pictures")], "image", pictures)
    assert list(items) == list(items)


def test_some_items_are_taken_by_their_places(pictures):
    items = Items([DataSpec(folder="pictures")], "image", pictures)
    some = items.at([2, 0])
    every = list(items)
    assert list(some) == [every[0], every[2]] and len(some) == 2
    assert some.pick({1}) == {1: every[2]}
    assert [item for part in some.parts(1) for item in part.read(0)] == list(some)
    assert [list(part.read(1)) for part in some.parts(2)] == [[every[2]]]
    assert len({items.fingerprint, some.fingerprint, items.at([0]).fingerprint}) == 3


@pytest.mark.parametrize(
    ("spec", "modality", "expected"),
    [
        ({"folder": "absent"}, "image", "There is no folder .*absent"),
        ({"folder": "pictures"}, "audio", "There are no audio items in .*pictures"),
        ({"folder": "pictures", "pattern": "*.gif"}, "image", "There are no image items"),
        ({"folder": "pictures", "pattern": "/tmp/*.gif"}, "image", "got the absolute '/tmp/"),
        ({"folder": "pictures", "label": "colour"}, "image", "'parent' or 'stem', got 'colour'"),
        ({"folder": "pictures"}, "text", "Texts come from a table or a data set, not from the folder .*pictures"),
        ({"folder": "pictures", "template": "a {}"}, "image", "A template goes with texts, not with image items"),
    ],
)
def test_a_wrong_folder_entry_is_refused(pictures, spec, modality, expected):
    with pytest.raises(ValueError, match=expected):
        Items([DataSpec(**spec)], modality, pictures)


# Tables

ROWS = [{"text": "007", "other": "a dog", "year": "1"}, {"text": "", "other": "a cat", "year": "2"}]


def write_table(folder, suffix, rows=ROWS):
    path = folder / f"texts{suffix}"
    names = list(rows[0])
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        lines = [names, *([row[name] for name in names] for row in rows)]
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path.name


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_table_gives_the_same_texts(tmp_path, suffix):
    table = write_table(tmp_path, suffix)
    items = list(texts(tmp_path, table=table, column=["text", "other"], label="year"))
    assert [item.value for item in items] == ["007", "a dog", "a cat"]
    assert [item.label for item in items] == ["1", "1", "2"]
    assert [item.key for item in items] == [f"{table}/0/text", f"{table}/0/other", f"{table}/1/other"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_first_column_is_the_default(tmp_path, suffix):
    assert values(texts(tmp_path, table=write_table(tmp_path, suffix))) == ["007"]


def test_text_that_looks_like_numbers_dates_or_nothing_stays_text(tmp_path):
    rows = [{"text": text} for text in ("007", "2020-01-01", "NA", "null", "1e3")]
    for suffix in (".csv", ".jsonl", ".parquet"):
        assert values(texts(tmp_path, table=write_table(tmp_path, suffix, rows))) == [row["text"] for row in rows]


def test_where_keeps_rows_with_one_of_the_values(tmp_path):
    rows = [{"text": str(i), "split": split, "year": year} for i, (split, year) in enumerate(["a1", "b1", "a2", "c1"])]
    table = write_table(tmp_path, ".csv", rows)
    assert values(texts(tmp_path, table=table, where={"split": ["a", "b"], "year": ["1"]})) == ["0", "1"]


def test_limit_counts_items_and_template_wraps_texts(tmp_path):
    table = write_table(tmp_path, ".csv")
    items = texts(tmp_path, table=table, column=["text", "other"], limit=2, template="a photo of {}.")
    assert values(items) == ["a photo of 007.", "a photo of a dog."]


def test_a_text_file_has_one_text_a_line(tmp_path):
    # A byte order mark, Windows line ends, a blank line, and a line separator of Unicode inside a text.
    (tmp_path / "texts.txt").write_bytes("\ufeffa dog\r\n  \r\na cat\u2028purrs\r\n".encode())
    assert values(texts(tmp_path, table="texts.txt")) == ["a dog", "a cat\u2028purrs"]


def test_a_json_file_is_a_list_or_an_object_of_texts(tmp_path):
    (tmp_path / "list.json").write_text('["a dog", "a cat"]')
    (tmp_path / "object.json").write_text('{"a dog": 3, "a cat": 5}')
    for name in ("list.json", "object.json"):
        assert values(texts(tmp_path, table=name)) == ["a dog", "a cat"]


def test_quoted_cells_may_hold_commas_and_line_breaks(tmp_path):
    (tmp_path / "texts.csv").write_text('\ufefftext,n\n"a dog, ""barking""\nloudly",1\n', encoding="utf-8")
    assert values(texts(tmp_path, table="texts.csv", column="text")) == ['a dog, "barking"\nloudly']


def test_quotation_marks_of_a_tsv_are_part_of_the_text(tmp_path):
    (tmp_path / "texts.tsv").write_text('text\tn\n"never closed\t1\n"a" dog, barking\t2\n')
    assert values(texts(tmp_path, table="texts.tsv", column="text")) == ['"never closed', '"a" dog, barking']


def test_file_names_of_a_table_start_from_its_folder_or_the_one_named(tmp_path):
    for folder in ("lists", "pool"):
        write_image(tmp_path / folder / "dog.png")
    (tmp_path / "lists" / "images.csv").write_text("file,kind\ndog.png,dog\n")
    beside = list(Items([DataSpec(table="lists/images.csv", label="kind")], "image", tmp_path))
    named = list(Items([DataSpec(table="lists/images.csv", files="pool")], "image", tmp_path))
    assert (beside[0].value, beside[0].key, beside[0].label) == (tmp_path / "lists" / "dog.png", "dog.png", "dog")
    assert named[0].value == tmp_path / "pool" / "dog.png"


def test_an_empty_label_is_no_class(tmp_path):
    (tmp_path / "texts.csv").write_text("text,kind\na dog,\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog", "kind": NaN}\n')
    (tmp_path / "null.jsonl").write_text('{"text": "a dog", "kind": null}\n')
    parquet.write_table(pa.table({"text": ["a dog"], "kind": pa.nulls(1, pa.string())}), tmp_path / "texts.parquet")
    for table in ("texts.csv", "texts.jsonl", "null.jsonl", "texts.parquet"):
        assert next(iter(texts(tmp_path, table=table, label="kind"))).label is None


def test_a_missing_text_is_no_item(tmp_path):
    (tmp_path / "texts.csv").write_text("text,n\na dog,1\n,2\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "a dog"}\n{"text": null}\n{"text": NaN}\n{}\n')
    parquet.write_table(pa.table({"text": ["a dog", None]}), tmp_path / "texts.parquet")
    for table in ("texts.csv", "texts.jsonl", "texts.parquet"):
        assert values(texts(tmp_path, table=table, column="text")) == ["a dog"]


def test_an_item_of_a_data_set_with_the_class_that_stands_for_none_has_no_class(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"text": ["a dog", "a secret", "another"], "kind": [1, -1, None]}
    (tmp_path / "stand-in").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "stand-in" / "test.parquet")
    items = stream(tmp_path, "text", column="text", label="kind", split="test")
    assert [item.label for item in items] == ["dog", None, None]
    assert values(stream(tmp_path, "text", column="kind", split="test")) == ["dog"]
    assert values(stream(tmp_path, "text", column="text", split="test", where={"kind": ["dog"]})) == ["a dog"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "text\n", "There are no text items in .*t.csv"),
        ("t.csv", "", "Cannot read the table .*t.csv: it is empty"),
        ("t.csv", "a,a\n1,2\n", "two columns have one name in a, a"),
        ("t.csv", "a,b\n1\n", "line 2: expected 2 cells, got 1"),
        ("t.csv", 'a,b\n1,"never closed\n2,x\n', "t.csv: line 3: unexpected end of data"),
        ("t.jsonl", '{"text": "a"}\n{"text"\n', "t.jsonl: line 2 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 is not an object"),
        ("t.jsonl", '{"text": ["a", "b"]}\n', r"Expected a text in t.jsonl/0/text, got \['a', 'b'\]"),
        ("t.json", "3", "expected a list of strings"),
        ("t.json", '[{"text": "a"}]', "expected a list of strings"),
        ("t.parquet", "no parquet", "Cannot read the table .*t.parquet"),
        ("t.xlsx", "x", "expected one of .txt, .json, .csv"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        texts(tmp_path, table=name)


@pytest.mark.parametrize(
    ("name", "line"), [("t.csv", b"caf\xe9"), ("t.txt", b"caf\xe9"), ("t.jsonl", b'{"a": "\xe9"}')]
)
def test_a_table_that_is_not_utf8_is_refused(tmp_path, name, line):
    (tmp_path / name).write_bytes(b"text\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"The table .*{name} is not UTF-8. Save it as UTF-8."):
        texts(tmp_path, table=name)


def test_a_missing_table_column_or_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read the table .*absent.csv: No such file"):
        texts(tmp_path, table="absent.csv")
    table = write_table(tmp_path, ".csv")
    for spec in ({"column": "caption"}, {"label": "caption"}, {"where": {"caption": ["1"]}}):
        with pytest.raises(ValueError, match=r"texts.csv has no column 'caption', it has text, other, year"):
            texts(tmp_path, table=table, **spec)
    with pytest.raises(ValueError, match=r"Cannot read image file .*a dog: No such file"):
        Items([DataSpec(table=table, column="other")], "image", tmp_path)


# Fingerprints


def test_reading_again_gives_the_same_fingerprint(pictures):
    write_table(pictures, ".csv")
    for modality, spec in (("image", DataSpec(folder="pictures")), ("text", DataSpec(table="texts.csv"))):
        first, second = (Items([spec], modality, pictures).fingerprint for _ in range(2))
        assert first == second


def test_the_fingerprint_of_texts_follows_content_order_limit_template_and_class(tmp_path):
    (tmp_path / "texts.csv").write_text("text,kind\na dog,1\na cat,2\n")
    seen = [texts(tmp_path, table="texts.csv").fingerprint]
    for changes in ({"limit": 1}, {"template": "a photo of {}"}, {"label": "kind"}, {"column": ["text", "kind"]}):
        seen.append(texts(tmp_path, table="texts.csv", **changes).fingerprint)
    (tmp_path / "texts.csv").write_text("text,kind\na dog,1\na cow,2\n")
    seen.append(texts(tmp_path, table="texts.csv").fingerprint)
    (tmp_path / "texts.csv").write_text("text,kind\na cat,1\na dog,2\n")
    seen.append(texts(tmp_path, table="texts.csv").fingerprint)
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_texts_is_blind_to_the_files_time_and_the_licence(tmp_path):
    path = tmp_path / write_table(tmp_path, ".csv")
    before = texts(tmp_path, table="texts.csv").fingerprint
    os.utime(path, (1, 1))
    assert texts(tmp_path, table="texts.csv", licence="MIT", note="hers").fingerprint == before


def test_the_fingerprint_of_files_follows_names_sizes_and_times(pictures):
    seen = [Items([DataSpec(folder="pictures")], "image", pictures).fingerprint]

    def note():
        seen.append(Items([DataSpec(folder="pictures")], "image", pictures).fingerprint)

    os.utime(pictures / "pictures" / "a" / "cat.PNG", (1, 1))
    note()
    (pictures / "pictures" / "a" / "cat.PNG").rename(pictures / "pictures" / "a" / "cow.PNG")
    note()
    write_image(pictures / "pictures" / "c.png")
    note()
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_of_files_is_blind_to_where_the_root_lies(pictures):
    before = Items([DataSpec(folder="pictures")], "image", pictures).fingerprint
    (pictures / "moved").mkdir()
    (pictures / "pictures").rename(pictures / "moved" / "pictures")
    assert Items([DataSpec(folder="pictures")], "image", pictures / "moved").fingerprint == before


# Data sets


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(rate=8000):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(rate // 4) / 9), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A data set of two parquet shards in the layout of the Hub, opened like one: by `load_dataset`, streamed."""
    root = tmp_path_factory.mktemp("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "sound": datasets.Audio(),
            "caption": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
            "captions": [datasets.Value("string")],
        }
    )
    for shard in range(2):
        rows = range(3 * shard, 3 * shard + 3)
        columns = {
            "picture": [{"bytes": png(row), "path": f"{row}.png"} for row in rows],
            "sound": [{"bytes": wav(), "path": f"{row}.wav"} for row in rows],
            "caption": [None if row == 1 else f"the dog {row}" for row in rows],
            "kind": [row % 2 for row in rows],
            "captions": [["a", "b"] for _ in rows],
        }
        # From arrow, since `datasets` encodes audio with torchcodec alone.
        table = datasets.table.InMemoryTable(pa.table(columns, schema=features.arrow_schema))
        part = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
        folder = root / "stand-in" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / f"train-{shard:05d}-of-00002.parquet")
    return root


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stream(root, modality, **spec):
    return Items([DataSpec(dataset="stand-in", **spec)], modality, root)


def test_a_data_set_streams_its_texts_and_passes_over_empty_cells(shards):
    items = stream(shards, "text", column="caption", template="hear {}")
    assert values(items) == [f"hear the dog {row}" for row in (0, 2, 3, 4, 5)]
    assert [item.key for item in items][1:3] == ["stand-in/train/0-2/caption", "stand-in/train/1-0/caption"]
    assert len(items) == 0  # It does not tell before its end.


def test_lists_fall_into_stretches_and_data_sets_into_their_files(shards, tmp_path):
    (tmp_path / "texts.txt").write_text("a\nb\nc")
    specs = [DataSpec(table=str(tmp_path / "texts.txt")), DataSpec(dataset="stand-in", column="caption")]
    items = Items([*specs, DataSpec(dataset="stand-in", column="caption", limit=4)], "text", shards)
    parts = items.parts(2)
    assert [(part.number, part.size) for part in parts] == [(0, 2), (1, 1), (2, None), (3, None), (4, None)]
    assert [item for part in parts for item in part.read(0)] == list(items)
    assert [[item.value for item in part.read(1)] for part in parts] == [
        ["b"],
        [],
        ["the dog 2"],
        ["the dog 4", "the dog 5"],
        ["the dog 2", "the dog 3", "the dog 4"],
    ]


def test_pictures_of_a_data_set_reach_the_processor_as_encoded(shards, tiny_clip, tiny_clap):
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    items = list(stream(shards, "image", column="picture", limit=4))
    assert [item.value["bytes"] for item in items] == [png(row) for row in range(4)]
    pixels = processor(images=[item.value for item in items])["pixel_values"]
    whole = processor(images=[Image.new("RGB", (8, 8), (row, 0, 0)) for row in range(4)])["pixel_values"]
    assert (pixels == whole).all()


def test_sounds_of_a_data_set_reach_the_processor_without_torchcodec(shards, tiny_clip, tiny_clap):
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)
    items = list(stream(shards, "audio", column="sound", limit=2))
    features = processor(audio=[item.value for item in items])["input_features"]
    assert (features == processor(audio=[wav(), wav()])["input_features"]).all()


def test_class_numbers_of_a_data_set_become_names(shards):
    items = stream(shards, "image", column="picture", label="kind", where={"kind": ["dog"]})
    assert [(item.key, item.label) for item in items] == [
        (f"stand-in/train/{place}/picture", "dog") for place in ("0-1", "1-0", "1-2")
    ]


def test_a_limit_reads_no_further_than_it_must(shards):
    items = stream(shards, "text", column="caption", limit=2)
    read = []
    rows = items._parts[0]._rows
    items._parts[0]._rows = (read.append(row) or row for row in rows)
    assert values(items) == ["the dog 0", "the dog 2"]
    assert len(read) == 3


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, "'stand-in' needs column: the name of its text column"),
        ({"column": "text"}, "'stand-in' has no column 'text', it has picture, sound, caption, kind, captions"),
        ({"column": "caption", "label": "class"}, "has no column 'class'"),
        ({"column": "caption", "where": {"class": ["a"]}}, "has no column 'class'"),
        ({"column": "caption", "split": "test"}, r"Cannot open the data set 'stand-in' \(config None, split test\)"),
        (
            {"column": "caption", "config": "large"},
            r"Cannot open the data set 'stand-in' \(config large, split train\)",
        ),
    ],
)
def test_a_wrong_data_set_entry_is_refused_before_any_row_is_read(shards, spec, expected):
    with pytest.raises(ValueError, match=expected):
        stream(shards, "text", **spec)


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="Cannot open the data set 'nobody/nothing'"):
        Items([DataSpec(dataset="nobody/nothing", column="text")], "text", tmp_path)


def test_a_data_set_that_is_a_script_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("")
    with pytest.raises(ValueError, match=r"Cannot open the data set 'old'.*scripts are no longer supported"):
        Items([DataSpec(dataset="old", column="text")], "text", tmp_path)


def test_a_data_set_whose_where_keeps_nothing_is_refused_at_its_end(shards):
    with pytest.raises(ValueError, match="There are no text items in the data set 'stand-in'"):
        list(stream(shards, "text", column="caption", where={"kind": ["cow"]}))


def test_a_list_of_texts_in_a_cell_is_an_item_each(shards):
    items = list(stream(shards, "text", column="captions"))
    assert [item.key for item in items][:2] == [f"stand-in/train/0-0/captions/{place}" for place in (0, 1)]
    assert [item.value for item in items][:2] == ["a", "b"]


def test_columns_that_only_the_rows_tell_are_checked_there(tmp_path):
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "train.csv").write_text("text,n\na dog,1\n")
    assert values(stream(tmp_path, "text", column="text")) == ["a dog"]
    with pytest.raises(ValueError, match="'stand-in' has no column 'caption', it has text, n"):
        list(stream(tmp_path, "text", column="caption"))


def test_files_inside_an_archive_of_a_data_set_are_read(tmp_path):
    (tmp_path / "stand-in").mkdir()
    with zipfile.ZipFile(tmp_path / "stand-in" / "train.zip", "w") as archive:
        archive.writestr("0.png", png(5))
    assert [value.fetch() for value in values(stream(tmp_path, "image", column="image"))] == [png(5)]


def test_the_fingerprint_of_a_data_set_follows_its_entry_and_its_files(tmp_path):
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "train.csv").write_text("text,kind\na dog,1\n")
    seen = [stream(tmp_path, "text", column="text").fingerprint]
    assert stream(tmp_path, "text", column="text", note="again").fingerprint == seen[0]
    for changes in ({"limit": 1}, {"template": "hear {}"}, {"label": "kind"}):
        seen.append(stream(tmp_path, "text", column="text", **changes).fingerprint)
    (tmp_path / "stand-in" / "train.csv").write_text("text,kind\na dog,1\na cat,2\n")
    seen.append(stream(tmp_path, "text", column="text").fingerprint)
    assert len(set(seen)) == len(seen)


def test_data_files_select_files_of_a_data_set(shards):
    items = stream(shards, "text", column="caption", data_files="data/*-00001-of-*.parquet")
    assert values(items) == ["the dog 3", "the dog 4", "the dog 5"]


def test_files_without_a_repository_or_a_folder_are_refused(tmp_path):
    spec = DataSpec(dataset="csv", column="text", data_files="texts/*.csv")
    with pytest.raises(ValueError, match=r"Expected data_files of 'csv' as hf://.*got 'texts/\*.csv'"):
        Items([spec], "text", tmp_path)


@pytest.mark.parametrize(
    ("spec", "opened_as"),
    [
        (
            {"dataset": "some/set", "revision": "main"},
            {"name": "some/set", "revision": "0a1b2c", "data_files": None},
        ),
        (
            {"dataset": "some/set", "data_files": "dev/*.csv"},
            {"name": "some/set", "revision": "0a1b2c", "data_files": "dev/*.csv"},
        ),
        (
            {"dataset": "csv", "data_files": "hf://datasets/some/set/dev/*.csv"},
            {"name": "csv", "revision": None, "data_files": "hf://datasets/some/set@0a1b2c/dev/*.csv"},
        ),
        (
            {"dataset": "csv", "data_files": "hf://datasets/some/set@main/dev/*.csv"},
            {"name": "csv", "revision": None, "data_files": "hf://datasets/some/set@0a1b2c/dev/*.csv"},
        ),
    ],
)
def test_a_hub_data_set_is_read_at_the_commit_that_its_fingerprint_names(tmp_path, monkeypatch, spec, opened_as):
    class Resolved(str):
        resolved = "0a1b2c"

    opened, asked = {}, []

    def load_dataset(name, config, **options):
        opened.update(options, name=name)
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "a dog"}]))

    def resolve_revision(name, revision, repo_type):
        asked.append((name, repo_type))
        return Resolved(revision)

    monkeypatch.setattr("transformers.utils.hub.resolve_revision", resolve_revision)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items = Items([DataSpec(column="text", **spec)], "text", tmp_path)
    assert opened == {**opened_as, "split": "train", "streaming": True}
    assert asked == [("some/set", "dataset")]
    monkeypatch.setattr(Resolved, "resolved", "ffff")
    assert Items([DataSpec(column="text", **spec)], "text", tmp_path).fingerprint != items.fingerprint


def test_a_folder_behind_an_address_is_read_like_one_at_hand(tmp_path):
    for name in ("dog/b.wav", "cat/a.wav", "dog/._b.wav", "dog/notes.txt"):
        path = tmp_path / "remote" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    remote = Items([DataSpec(folder=f"file://{tmp_path / 'remote'}", label="parent")], "audio", tmp_path)
    local = Items([DataSpec(folder="remote", label="parent")], "audio", tmp_path)
    assert [(item.key, item.label) for item in remote] == [(item.key, item.label) for item in local]
    assert [item.value.fetch() for item in remote] == [b"cat/a.wav", b"dog/b.wav"]
    assert [item.value.path for item in remote] == [f"file://{item.value}" for item in local]
    assert len(remote) == 2
    (tmp_path / "remote" / "cat" / "a.wav").write_bytes(b"longer than before")
    again = Items([DataSpec(folder=f"file://{tmp_path / 'remote'}", label="parent")], "audio", tmp_path)
    assert again.fingerprint != remote.fingerprint


def test_an_address_without_files_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"There are no audio items in file://.*nothing"):
        Items([DataSpec(folder=f"file://{tmp_path / 'nothing'}")], "audio", tmp_path)


# Tables and files behind addresses


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/captions.csv", b"text,file\na dog,dog.png\na cat,cat.png\n")
    for name in ("dog", "cat"):
        files.pipe_file(f"/bucket/photos/{name}.png", name.encode())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_a_table_at_an_address_has_the_items_of_a_file(bucket, tmp_path):
    (tmp_path / "captions.csv").write_text("text,file\na dog,dog.png\na cat,cat.png\n")
    there, here = texts(tmp_path, table=f"{bucket}/captions.csv"), texts(tmp_path, table="captions.csv")
    assert list(there) == list(here)
    assert there.fingerprint == here.fingerprint
    assert [item.key for item in there] == ["captions.csv/0/text", "captions.csv/1/text"]


@pytest.mark.parametrize("table", ["memory://bucket/captions.csv", "here.csv"])
def test_the_files_of_a_table_are_fetched_from_an_address(bucket, tmp_path, table):
    (tmp_path / "here.csv").write_text("text,file\na dog,dog.png\na cat,cat.png\n")
    spec = DataSpec(table=table, column="file", files=f"{bucket}/photos", label="text")
    items = list(Items([spec], "image", tmp_path))
    assert [(item.key, item.label, item.value.path, item.value.fetch()) for item in items] == [
        ("dog.png", "a dog", "memory://bucket/photos/dog.png", b"dog"),
        ("cat.png", "a cat", "memory://bucket/photos/cat.png", b"cat"),
    ]


def test_the_files_of_a_table_at_an_address_lie_beside_it(bucket, tmp_path):
    items = list(Items([DataSpec(table=f"{bucket}/captions.csv", column="file")], "image", tmp_path))
    assert items[0].value.path == "memory://bucket/dog.png"
    with pytest.raises(ValueError, match=r"There is no file memory://bucket/dog\.png\. Check the table"):
        items[0].value.fetch()


def test_a_table_at_an_address_that_is_missing_or_too_large_is_named(bucket, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Cannot read the table memory://bucket/none\.csv"):
        texts(tmp_path, table=f"{bucket}/none.csv")
    monkeypatch.setattr(data, "MAX_TABLE_BYTES", 37)
    with pytest.raises(ValueError, match=r"captions\.csv: it has 38 bytes, expected at most 37 in memory: read it as"):
        texts(tmp_path, table=f"{bucket}/captions.csv")


def test_a_table_on_the_hub_and_its_files_are_those_of_one_commit(hub, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "captions.csv").write_text("text,file\na dog,dog.png\n")
    (tmp_path / "set" / "dog.png").write_bytes(b"dog")
    commit = hub.add("datasets/org/set", tmp_path / "set")
    items = Items([DataSpec(table="hf://datasets/org/set/captions.csv", column="file")], "image", tmp_path)
    (tmp_path / "set" / "dog.png").write_bytes(b"another")
    hub.add("datasets/org/set", tmp_path / "set")
    (item,) = items
    assert item.value.path == f"hf://datasets/org/set@{commit}/dog.png"
    assert item.value.fetch() == b"dog"
    assert next(iter(texts(tmp_path, table="hf://datasets/org/set/captions.csv"))).key == "captions.csv/0/text"


def test_the_names_of_many_files_take_little_memory(tmp_path):
    rows = 20_000
    lines = "".join(f"{row // 1000:04d}/{row:09d}.jpg\n" for row in range(rows))
    (tmp_path / "files.csv").write_text("file\n" + lines)
    tracemalloc.start()
    try:
        items = Items([DataSpec(table="files.csv")], "image", tmp_path, strict=False)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(items) == rows
    assert kept < 150 * rows
