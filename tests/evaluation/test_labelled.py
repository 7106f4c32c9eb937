import json
from pathlib import Path

import pytest
from PIL import Image

from cmcr_hf.evaluation.labelled import LabelledSet, label_items, load_audioset, load_esc50, load_imagenet, read_words
from cmcr_hf.training import data
from cmcr_hf.training.data import Items
from cmcr_hf.training.recipe import DataSpec
from tests.media import encode_audio, encode_image, noise, picture


def write_clip(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_audio(noise(800, seed=seed)))


def keys(data: LabelledSet) -> list[str]:
    return [item.key for item in data.items]


# ESC-50


@pytest.fixture
def esc50(tmp_path: Path) -> Path:
    """Three clips with the rows that the release has."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for number, (name, fold, target, category) in enumerate(
        [("1-100032-A-0.wav", 1, 0, "dog"), ("2-1-A-20.wav", 2, 20, "crying_baby"), ("5-9-B-0.wav", 5, 0, "dog")]
    ):
        rows.append(f"{name},{fold},{target},{category},{target == 0},{number},A")
        write_clip(tmp_path / "audio" / name, number)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_esc50_is_read_whole_in_the_order_of_its_table(esc50: Path) -> None:
    data = load_esc50(esc50)
    assert [item.value for item in data.items] == [
        esc50 / "audio" / name for name in ("1-100032-A-0.wav", "2-1-A-20.wav", "5-9-B-0.wav")
    ]
    assert (data.classes, data.words) == (["crying_baby", "dog"], [["crying baby"], ["dog"]])
    assert data.labels == [[1], [0], [1]]


def test_folds_of_esc50_are_read_alone(esc50: Path) -> None:
    data = load_esc50(esc50, [5, 2])
    assert keys(data) == ["2-1-A-20.wav", "5-9-B-0.wav"] and data.part == "fold 2 and 5 of five"
    assert load_esc50(esc50, [1, 2, 3, 4, 5]).part is None


@pytest.mark.parametrize("missing", ["meta", "audio"])
def test_a_folder_without_esc50_says_where_to_get_it(esc50: Path, missing: str) -> None:
    (esc50 / missing).rename(esc50 / "elsewhere")
    with pytest.raises(ValueError, match=r"hold meta/esc50\.csv and audio/\*\.wav.*karolpiczak/ESC-50 \(CC BY"):
        load_esc50(esc50)


def test_a_clip_of_esc50_that_is_not_there_is_left_out_of_what_can_be_read(esc50: Path) -> None:
    (esc50 / "audio" / "5-9-B-0.wav").unlink()
    data = load_esc50(esc50).readable({"1-100032-A-0.wav", "2-1-A-20.wav"})
    assert data.record()["missing"] == ["5-9-B-0.wav"] and data.record()["unreadable"] == []
    assert data.labels == [[1], [0]]


# AudioSet

SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=5, num_segs=5, num_unique_labels=3, num_positive_labels=7
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0bt9lr"
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"
YZABCDEFGHI, 30.000, 40.000, "/m/068hy"
012345678_a, 1.500, 11.500, "/m/03v3yw,/m/068hy"
gonegonegon, 0.000, 10.000, "/m/0bt9lr"
"""
INDICES = """index,mid,display_name
0,/m/068hy,"Domestic animals, pets"
1,/m/0bt9lr,Dog
2,/m/03v3yw,Keys jangling
3,/m/09x0r,Speech
"""


@pytest.fixture
def audioset(tmp_path: Path) -> Path:
    """Four clips of five, under the names of four downloaders, and files that are none of the clips."""
    (tmp_path / "eval_segments.csv").write_text(SEGMENTS)
    (tmp_path / "class_labels_indices.csv").write_text(INDICES)
    names = ["Y--4gqARaEJE", "-0RWZT-miFs_420.000", "YZABCDEFGHI", "012345678_a_1500_11500", "gonegonegonX", "other"]
    for name in names:
        write_clip(tmp_path / "eval" / f"{name}.wav")
    return tmp_path


def test_clips_of_audioset_are_found_under_the_names_of_common_downloaders(audioset: Path) -> None:
    data = load_audioset(audioset)
    names = ["Y--4gqARaEJE", "-0RWZT-miFs_420.000", "YZABCDEFGHI", "012345678_a_1500_11500"]
    assert [item.value for item in data.items] == [audioset / "eval" / f"{name}.wav" for name in names]
    assert data.missing == ["gonegonegon"]


def test_a_clip_of_audioset_has_several_of_all_classes(audioset: Path) -> None:
    data = load_audioset(audioset)
    assert data.several
    assert data.classes == ["Domestic animals, pets", "Dog", "Keys jangling", "Speech"]
    assert data.labels == [[0, 1], [2], [0], [2, 0]]
    assert data.relevant.tolist() == [
        [True, True, False, False],
        [False, False, True, False],
        [True, False, False, False],
        [True, False, True, False],
    ]


def test_without_the_table_the_ontology_names_the_classes_that_are_used(audioset: Path) -> None:
    (audioset / "class_labels_indices.csv").unlink()
    entries = [{"id": "/m/03v3yw", "name": "Keys jangling"}, {"id": "/m/0dgw9r", "name": "Human sounds"}]
    entries += [{"id": "/m/0bt9lr", "name": "Dog"}, {"id": "/m/068hy", "name": "Domestic animals, pets"}]
    (audioset / "ontology.json").write_text(json.dumps(entries))
    data = load_audioset(audioset)
    assert data.classes == ["Keys jangling", "Dog", "Domestic animals, pets"]
    assert data.labels == [[2, 1], [0], [2], [0, 2]]


@pytest.mark.parametrize("name", ["eval_segments.csv", "class_labels_indices.csv"])
def test_a_folder_without_audioset_says_where_to_get_it(audioset: Path, name: str) -> None:
    (audioset / name).unlink()
    with pytest.raises(ValueError, match=r"research\.google\.com/audioset/download\.html \(CC BY 4\.0"):
        load_audioset(audioset)


def test_lists_without_any_clip_say_how_clips_are_named(audioset: Path) -> None:
    for path in (audioset / "eval").iterdir():
        path.rename(path.with_stem(f"x{path.stem}"))
    with pytest.raises(ValueError, match=r"no clip of .*eval_segments\.csv.*YTID_START\.wav"):
        load_audioset(audioset)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("eval_segments.csv", "--4gqARaEJE, 0.000, 10.000\n", r"eval_segments\.csv: not enough values"),
        (
            "eval_segments.csv",
            SEGMENTS.replace("03v3yw", "new"),
            "the class '/m/new', unknown to .*_indices",
        ),
        ("class_labels_indices.csv", "index,display_name\n0,Dog\n", r"class_labels_indices\.csv: 'mid'"),
    ],
)
def test_damaged_lists_of_audioset_are_named(audioset: Path, name: str, text: str, message: str) -> None:
    (audioset / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_audioset(audioset)


# ImageNet and other folders

MAPPING = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\nn01443537 goldfish, Carassius auratus\n"


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """`val` in folders, and the mapping beside it."""
    (tmp_path / "LOC_synset_mapping.txt").write_text(MAPPING)
    for name in ("n02012849/ILSVRC2012_val_00000002.JPEG", "n01440764/ILSVRC2012_val_00000001.JPEG"):
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_image(Image.fromarray(picture()), "JPEG"))
    return tmp_path / "val"


def test_the_classes_of_imagenet_are_the_folders_in_words(imagenet: Path) -> None:
    data = load_imagenet(imagenet)
    assert keys(data) == ["n01440764/ILSVRC2012_val_00000001.JPEG", "n02012849/ILSVRC2012_val_00000002.JPEG"]
    assert (data.classes, data.words) == (["n01440764", "n02012849"], [["tench"], ["crane"]])
    assert data.labels == [[0], [1]]


def test_own_words_replace_those_of_the_mapping(imagenet: Path) -> None:
    words = {"n01440764": ["tench"], "n02012849": ["crane", "wading bird"]}
    assert load_imagenet(imagenet, words).words == [["tench"], ["crane", "wading bird"]]


def test_a_folder_without_imagenet_says_where_to_get_it(imagenet: Path) -> None:
    (imagenet.parent / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(ValueError, match=r"image-net\.org.*LOC_synset_mapping\.txt"):
        load_imagenet(imagenet)


def test_validation_images_that_are_not_in_folders_are_refused(imagenet: Path) -> None:
    for path in list(imagenet.glob("*/*")):
        path.rename(imagenet / path.name)
    with pytest.raises(ValueError, match=r"no words for the class 'val'.*CLASS/\*\.JPEG"):
        load_imagenet(imagenet)


@pytest.mark.parametrize(("limit", "listings"), [(None, 1), (1, 2)])
def test_a_data_set_is_listed_twice_only_where_fewer_items_are_told_apart_from_all_classes(
    esc50: Path, imagenet: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, listings: int
) -> None:
    listed = []
    for name in ("_list_folder", "_list_table"):
        original = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *given, call=original: listed.append(given) or call(*given))
    for load, folder in ((load_esc50, esc50), (load_imagenet, imagenet)):
        whole = load(folder).classes
        listed.clear()
        found = load(folder, limit=limit)
        assert (found.classes, len(listed)) == (whole, listings)


def test_without_words_a_class_is_called_by_its_name() -> None:
    items = Items.listed("text", ["x", "y"], labels=["night_stand", "bed"])
    data = label_items("mine", items)
    assert (data.classes, data.words, data.labels) == (["bed", "night_stand"], [["bed"], ["night stand"]], [[1], [0]])


def test_classes_of_a_table_are_those_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,kind\na.wav,dog\nb.wav,cat\n")
    for name in "ab":
        write_clip(tmp_path / f"{name}.wav")
    items = Items([DataSpec(table="t.csv", column="file", label="kind")], "audio", tmp_path)
    assert label_items("mine", items).labels == [[1], [0]]


def test_an_item_without_a_class_is_named() -> None:
    with pytest.raises(ValueError, match="item '000001' has no class"):
        label_items("mine", Items.listed("text", ["x", "y"], labels=["bed", None]))


# Words


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("w.txt", MAPPING, {"n01440764": ["tench"], "n02012849": ["crane"], "n03126707": ["crane"]}),
        ("w.txt", "dog\tbig_dog\n\n", {"dog": ["big dog"]}),
        (
            "w.json",
            '{"dog": "a hound", "cat": ["cat", "tom_cat"]}',
            {"dog": ["a hound"], "cat": ["cat", "tom cat"]},
        ),
        ("w.json", '{"0": ["n01440764", "tench"]}', {"n01440764": ["tench"]}),
        ("w.json", '{"0": ["cat", "kitten"]}', {"0": ["cat", "kitten"]}),
    ],
)
def test_words_are_read(tmp_path: Path, name: str, text: str, expected: dict[str, list[str]]) -> None:
    (tmp_path / name).write_text(text)
    found = read_words(tmp_path / name)
    assert {key: found[key] for key in expected} == expected


def test_a_list_of_words_is_in_the_order_of_the_classes(imagenet: Path) -> None:
    (imagenet / "clip.json").write_text('["great_tench", ["crane", "wading bird"]]')
    assert load_imagenet(imagenet, read_words(imagenet / "clip.json")).words == [
        ["great tench"],
        ["crane", "wading bird"],
    ]
    with pytest.raises(ValueError, match="There are 1 names for 2 classes"):
        load_imagenet(imagenet, [["tench"]])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("w.txt", ""),
        ("w.txt", "dog\n"),
        ("w.json", "{}"),
        ("w.json", "[1]"),
        ("w.json", "[]"),
        ("w.json", '"dog"'),
        ("w.json", '{"cat": "cat", "dog": []}'),
        ("w.json", "{"),
        ("w.json", '{"dog": 1}'),
        ("w.json", '{"dog": []}'),
        ("w.json", '{"dog": [""]}'),
        ("w.json", '{"dog": [1]}'),
        ("none.txt", None),
    ],
)
def test_what_is_no_list_of_words_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="Expected lines `CLASS NAME`, a JSON object"):
        read_words(tmp_path / name)
