import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from cmcr_hf.cli import main
from cmcr_hf.evaluation.classification import top_1_hits
from cmcr_hf.evaluation.labelled import LabelledSet
from cmcr_hf.evaluation.modelnet40 import CLASSES
from cmcr_hf.evaluation.pairs import load_pairs
from cmcr_hf.evaluation.zero_shot import (
    IMAGE_TEMPLATES,
    PUBLISHED,
    TEMPLATES,
    breakdowns,
    cases,
    measure,
    notes,
    read_templates,
)
from cmcr_hf.training.data import Items
from tests.media import encode_audio, encode_image, noise


def labelled(labels: Sequence[Sequence[int]], classes: int, *, several: bool = False) -> LabelledSet:
    names = [f"class_{index}" for index in range(classes)]
    texts = [f"text {row}" for row in range(len(labels))]
    words = [[name.replace("_", " ")] for name in names]
    items = Items.listed("text", texts)
    return LabelledSet("mine", items, names, words, [list(own) for own in labels], several=several)


# Numbers


def test_items_of_one_class_are_measured_as_scikit_learn_does() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(120, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (120,), generator=generator)
    found = measure(scores, labelled(labels[:, None].tolist(), 7), resamples=0).metrics["model"]
    for k in (1, 3, 5):
        expected = metrics.top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert found[f"top-{k}"] == pytest.approx(expected, abs=1e-9)
    assert found["class mean"] == pytest.approx(metrics.balanced_accuracy_score(labels, scores.argmax(1)), abs=1e-9)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_ties_are_the_mean_of_scikit_learn_over_every_order_of_the_classes() -> None:
    scores = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [2, 1, 1, 1], [0, 3, 3, 1], [1, 0, 0, 1]], float)
    labels = np.array([2, 0, 3, 0, 3])
    found = measure(torch.tensor(scores), labelled(labels[:, None].tolist(), 4), resamples=0).metrics["model"]
    orders = [np.array(order) for order in permutations(range(4))]
    # Column i of the permuted scores is class order[i].
    tops = {k: [] for k in (1, 3)}
    balanced = []
    for order in orders:
        moved = np.argsort(order)[labels]
        for k, values in tops.items():
            values.append(metrics.top_k_accuracy_score(moved, scores[:, order], k=k, labels=range(4)))
        balanced.append(metrics.balanced_accuracy_score(moved, scores[:, order].argmax(1)))
    assert found["top-1"] == pytest.approx(np.mean(tops[1]), abs=1e-9)
    assert found["top-3"] == pytest.approx(np.mean(tops[3]), abs=1e-9)
    assert found["class mean"] == pytest.approx(np.mean(balanced), abs=1e-9)


def test_items_of_several_classes_are_measured_as_scikit_learn_does() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(80, 6, generator=generator, dtype=torch.float64)
    relevant = torch.rand(80, 6, generator=generator) < 0.3
    relevant[:, 5] = False
    data = labelled([row.nonzero()[:, 0].tolist() for row in relevant], 6, several=True)
    found = measure(scores, data, resamples=0)
    expected = metrics.average_precision_score(relevant[:, :5], scores[:, :5], average="macro")
    assert found.metrics["model"]["mAP"] == pytest.approx(expected, abs=1e-9)
    best = scores.argmax(1)
    assert found.metrics["model"]["top-1"] == pytest.approx(relevant[torch.arange(80), best].double().mean().item())
    assert found.by_class[5].isnan()
    assert notes(data, found.by_class) == ["Left out of the mean: 1 class without an item here, of 6."]


@pytest.mark.parametrize("several", [False, True])
def test_constant_scores_of_one_class_an_item_give_chance(several: bool) -> None:
    data = labelled([[0], [1], [2], [0]], 3, several=several)
    found = measure(torch.full((4, 3), 0.5), data, resamples=0).metrics
    assert found["model"]["top-1"] == pytest.approx(found["chance"]["top-1"]) == pytest.approx(1 / 3)


def test_the_chance_of_average_precision_is_its_mean_over_random_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    data = labelled([[0], [1], [0, 2], [], [2], [2, 1], [2]], 3, several=True)
    draws = [
        measure(torch.rand(7, 3, generator=generator), data, resamples=0).metrics["model"]["mAP"] for _ in range(1000)
    ]
    chance = measure(torch.rand(7, 3), data, resamples=0).metrics["chance"]["mAP"]
    assert np.mean(draws) == pytest.approx(chance, abs=0.015)


def test_an_item_without_a_class_is_never_right() -> None:
    scores = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert top_1_hits(scores, torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()).tolist() == [0.5, 0, 1]


def test_a_single_class_is_always_right() -> None:
    found = measure(torch.tensor([[0.1], [0.2]]), labelled([[0], [0]], 1), resamples=10)
    assert found.metrics["model"] == found.metrics["chance"] == {"top-1": 1.0, "class mean": 1.0}
    assert found.intervals == {"top-1": (1.0, 1.0), "class mean": (1.0, 1.0)}


@pytest.mark.parametrize("several", [False, True])
def test_intervals_hold_the_values_and_depend_on_the_seed_alone(several: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 6, generator=generator)
    data = labelled([[row % 6] for row in range(60)], 6, several=several)
    first, second, other = (measure(scores, data, resamples=200, seed=seed) for seed in (0, 0, 1))
    assert first.intervals == second.intervals != other.intervals
    assert set(first.intervals) == set(first.metrics["model"])
    for name, (low, high) in first.intervals.items():
        assert low < high
        assert low - 0.02 <= first.metrics["model"][name] <= high


# What a page shows


def test_the_most_confused_classes_come_first() -> None:
    scores = torch.eye(3)[[0, 1, 1, 1, 2, 0, 0]]
    data = labelled([[0], [0], [0], [1], [1], [2], [2]], 3)
    by_class, confused = breakdowns(scores, data, measure(scores, data, resamples=0).by_class)
    assert by_class.rows == [
        ("class 1", 0.5, "2 items"),
        ("class 0", pytest.approx(1 / 3), "3 items"),
        ("class 2", 0.0, "2 items"),
    ]
    assert confused.rows == [
        ("class 0 → class 1", pytest.approx(2 / 3), "2 of 3 items"),
        ("class 2 → class 0", 1.0, "2 of 2 items"),
        ("class 1 → class 2", 0.5, "1 of 2 items"),
    ]


def test_cases_are_the_clearest_of_each_class() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.2, 0.3], [0.7, 0.1], [0.3, 0.5]])
    best, worst = cases(scores, labelled([[0], [0], [1], [1], [0]], 2))
    assert [(case.query.name, case.query.label) for case in best] == [("000000", "class 0"), ("000002", "class 1")]
    assert [(case.query.name, case.query.label) for case in worst] == [("000003", "class 1"), ("000004", "class 0")]
    assert best[0].score == pytest.approx(0.8)
    assert worst[0].score == pytest.approx(-0.6)
    assert worst[0].note == "its class is behind the best other one by that cosine"
    assert [(shown.value, shown.right) for shown in worst[0].found] == [("class 0", False), ("class 1", True)]


def test_an_item_of_no_class_or_of_all_is_no_case() -> None:
    best, worst = cases(torch.tensor([[0.9, 0.1], [0.2, 0.3]]), labelled([[], [0, 1]], 2, several=True))
    assert best == worst == []


def test_classes_of_one_name_are_told_apart_and_said() -> None:
    data = labelled([[0], [1]], 2)
    data.words = [["crane"], ["crane"]]
    (by_class, _) = breakdowns(torch.eye(2), data, torch.ones(2))
    assert [name for name, _, _ in by_class.rows] == ["crane (class_0)", "crane (class_1)"]
    assert notes(data, torch.ones(2)) == ["Classes of one name cannot be told apart: crane."]


# Templates


def test_every_default_template_has_one_place_for_the_name() -> None:
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)
    assert {modality: len(templates) for modality, templates in TEMPLATES.items()} == {
        "image": 7,
        "audio": 1,
        "point_cloud": 64,
    }


@pytest.mark.parametrize(("name", "text"), [("t.txt", "a {}.\n\n  the {}\n"), ("t.json", '["a {}.", "the {}"]')])
def test_templates_are_read_from_lines_or_a_list(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_templates(tmp_path / name) == ["a {}.", "the {}"]


@pytest.mark.parametrize("text", ["", "\n", None])
def test_a_file_without_templates_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=r"t\.txt"):
        read_templates(tmp_path / "t.txt")


# The command


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def clip(seed: int) -> bytes:
    return encode_audio(noise(4000, seed=seed))


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return encode_image(Image.fromarray(pixels), "JPEG")


def write_esc50(folder: Path) -> None:
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for row, kind in enumerate(("dog", "cat", "sea_bell", "dog", "cat", "train")):
        rows.append(f"{row}.wav,{row % 5 + 1},{row},{kind},False,0,A")
        write(folder / "audio" / f"{row}.wav", clip(row))
    write(folder / "meta" / "esc50.csv", "\n".join(rows))


def write_audioset(folder: Path) -> None:
    ids = [f"{row}bcdefghijk" for row in range(5)]
    labels = ["/m/dog", "/m/dog,/m/cat", "/m/sea", "/m/cat", "/m/sea,/m/dog"]
    lines = ["# made", "# num_ytids=5", "# YTID, start_seconds, end_seconds, positive_labels"]
    lines += [f'{name}, 0.000, 10.000, "{own}"' for name, own in zip(ids, labels, strict=True)]
    write(folder / "eval_segments.csv", "\n".join(lines))
    write(folder / "class_labels_indices.csv", "index,mid,display_name\n0,/m/dog,dog\n1,/m/cat,cat\n2,/m/sea,sea\n")
    for row, name in enumerate(ids[:4]):
        write(folder / "wav" / f"Y{name}.wav", clip(row))


def write_imagenet(folder: Path) -> None:
    write(folder / "LOC_synset_mapping.txt", "n00000001 dog, hound\nn00000002 cat\n")
    for row in range(4):
        write(folder / f"n0000000{row % 2 + 1}" / f"{row}.JPEG", photo(row))


def write_modelnet40(folder: Path) -> None:
    box = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 {0} 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    for row, name in enumerate(CLASSES):
        write(folder / name / "test" / "1.off", box.format(row + 1))


def write_folder(folder: Path) -> None:
    for row, kind in enumerate(("dog", "cat", "dog")):
        write(folder / kind / f"{row}.jpg", photo(row))


def write_table(folder: Path) -> None:
    rows = ["sound,kind,other"]
    for row, kind in enumerate(("dog", "cat", "bell", "dog")):
        write(folder / f"{row}.wav", clip(row))
        rows.append(f"{row}.wav,{kind},x")
    write(folder / "table.csv", "\n".join(rows))


def run(model: Path, folder: Path, layout: str, *more: str, data: str = "") -> int:
    arguments = ["--model", str(model), "--data", str(folder / data), "--layout", layout, "--device", "cpu"]
    output = ["--output", str(folder.parent / "out"), "--bootstrap", "20"]
    return main(["evaluate", "classification", *arguments, *output, *more])


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.parent / "out" / "result.json").read_text())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("layout", "write_layout", "more", "data", "title", "classes"),
    [
        ("esc-50", write_esc50, (), "", "ESC-50: 6 items, 4 classes", 4),
        ("audioset", write_audioset, (), "", "AudioSet: 4 items, 3 classes", 3),
        ("imagenet", write_imagenet, (), "", "ImageNet: 4 items, 2 classes", 2),
        ("folder", write_folder, ("--modality", "image"), "", "data: 3 items, 2 classes", 2),
        (
            "table",
            write_table,
            ("--modality", "audio", "--label", "kind"),
            "table.csv",
            "table.csv: 4 items, 3 classes",
            3,
        ),
    ],
)
def test_every_layout_runs_from_files_to_numbers(
    tiny_model: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    write_layout: Any,
    more: tuple[str, ...],
    data: str,
    title: str,
    classes: int,
) -> None:
    write_layout(folder)
    assert run(tiny_model, folder, layout, *more, data=data) == 0
    assert capsys.readouterr().out.startswith(f"zero-shot classification of {title}\n")
    found = result(folder)
    values = found["metrics"]["model"]["zero-shot classification"]
    means = (
        {"top-1", "mAP"} if layout == "audioset" else {"top-1", "class mean"} | ({"top-3"} if classes > 2 else set())
    )
    assert set(values) == means
    assert set(found["intervals"]["model"]["zero-shot classification"]) == means
    assert all(0 <= value <= 1 for value in values.values())
    page = (folder.parent / "out" / "report.html").read_text()
    assert f"zero-shot classification of {title.partition(':')[0]}" in page
    assert found["breakdowns"][0]["title"] in page
    assert str(folder) not in page + json.dumps(found)


def test_a_data_set_of_the_hub_s_form_is_measured(tiny_model: Path, folder: Path) -> None:
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "sea", "cat"])}
    )
    rows = {"picture": [{"bytes": photo(row), "path": None} for row in range(4)], "kind": [0, 2, 0, 2]}
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test-0.parquet")
    options = ("--modality", "image", "--column", "picture", "--label", "kind", "--split", "test")
    assert run(tiny_model, folder, "table", *options) == 0
    found = result(folder)
    assert found["data"]["items"] == {"items": 4, "classes": 2}
    assert found["settings"]["names"] == ["cat", "dog"]
    assert (folder.parent / "out" / "report.html").read_text().count("data:image/jpeg") == len(
        found["best"] + found["worst"]
    )


def take_for_whole(monkeypatch: pytest.MonkeyPatch, layout: str, items: int) -> None:
    """Let so few items be the whole of a benchmark."""
    monkeypatch.setitem(PUBLISHED, layout, [replace(entry, of={"items": [items]}) for entry in PUBLISHED[layout]])


@pytest.mark.parametrize(("layout", "part"), [("esc-50", "6 items in place of 2,000"), ("modelnet40", "40 items in")])
def test_published_numbers_do_not_stand_beside_a_few_items_of_a_benchmark(
    tiny_model: Path, tiny_ulip_model: Path, folder: Path, layout: str, part: str
) -> None:
    (write_esc50 if layout == "esc-50" else write_modelnet40)(folder)
    assert run(tiny_model if layout == "esc-50" else tiny_ulip_model, folder, layout, "--template", "{}") == 0
    found = result(folder)
    assert found["published"] == [] and found["data"]["part"].startswith(part)
    assert f"This is {found['data']['part']}, which published numbers are not of, so none" in " ".join(found["notes"])


def test_modelnet40_runs_from_meshes_to_numbers_beside_the_published_ones(
    tiny_ulip_model: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_modelnet40(folder)
    take_for_whole(monkeypatch, "modelnet40", 40)
    assert run(tiny_ulip_model, folder, "modelnet40") == 0
    out = capsys.readouterr().out
    assert out.startswith("zero-shot classification of ModelNet40: 40 items, 40 classes\n")
    assert "C-MCR (published)" in out
    assert "Published numbers are of ULIP's 64" in out
    found = result(folder)
    assert set(found["metrics"]["model"]["zero-shot classification"]) == {"top-1", "top-3", "top-5", "class mean"}
    assert len(found["settings"]["templates"]) == 64
    assert found["settings"]["names"][CLASSES.index("night_stand")] == "night stand"
    page = (folder.parent / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == len(found["best"]) + len(found["worst"])
    assert "The first and the last 10 of 40" in page
    assert page.count("<td><svg") == 20 + min(len(found["breakdowns"][1]["rows"]), 20)


def test_prompts_go_through_the_space_that_is_named(tiny_model: Path, folder: Path) -> None:
    write_esc50(folder)
    settings = []
    for more in ((), ("--text-space", "clap")):
        assert run(tiny_model, folder, "esc-50", *more) == 0
        settings.append(result(folder)["settings"])
    assert [found["text_space"] for found in settings] == ["clip", "clap"]
    assert sorted(path.name.rpartition("-")[0] for path in (folder.parent / "out" / "stores").iterdir()) == [
        "clap-audio",
        "clap-text",
        "clip-text",
    ]


def test_the_same_run_gives_the_same_bytes_and_embeds_nothing_again(tiny_model: Path, folder: Path) -> None:
    write_table(folder)
    options = ("--modality", "audio", "--label", "kind")
    written = []
    for _ in range(2):
        assert run(tiny_model, folder, "table", *options, data="table.csv") == 0
        written.append(
            {path: path.stat().st_mtime_ns for path in (folder.parent / "out" / "stores").rglob("*.safetensors")}
        )
        written[-1] |= {name: (folder.parent / "out" / name).read_bytes() for name in ("result.json", "report.html")}
    assert written[0] == written[1]


def test_folds_names_templates_and_limits_reach_the_result(tiny_model: Path, folder: Path) -> None:
    write_esc50(folder)
    assert (
        run(tiny_model, folder, "esc-50", "--fold", "1", "--fold", "2", "--template", "a {}", "--template", "{}") == 0
    )
    found = result(folder)
    assert found["data"]["items"] == {"items": 3, "classes": 3}
    assert found["published"] == [] and found["data"]["part"] == "fold 1 and 2 of five"
    assert "This is fold 1 and 2 of five, which published numbers are not of, so none stand here." in found["notes"]
    assert found["settings"]["templates"] == ["a {}", "{}"]
    (folder / "t.txt").write_text("the {}\n")
    assert run(tiny_model, folder, "esc-50", "--prompts", str(folder / "t.txt"), "--limit", "2") == 0
    found = result(folder)
    assert (found["data"]["items"]["items"], found["settings"]["templates"]) == (2, ["the {}"])
    assert found["published"] == []
    assert "Published numbers are of the whole data set, so none stand here." in found["notes"]


def test_names_of_a_file_replace_those_of_the_folders(tiny_model: Path, folder: Path) -> None:
    write_folder(folder)
    write(folder.parent / "names.json", '{"dog": ["red dog", "loud dog"], "cat": "small cat"}')
    options = ("--modality", "image", "--names", str(folder.parent / "names.json"))
    assert run(tiny_model, folder, "folder", *options) == 0
    found = result(folder)
    assert sorted(name for name, _, _ in found["breakdowns"][0]["rows"]) == ["red dog", "small cat"]
    assert len(found["settings"]["templates"]) == len(IMAGE_TEMPLATES)


def test_missing_clips_are_listed_counted_and_left_out(
    tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audioset(folder)
    assert run(tiny_model, folder, "audioset") == 0
    assert "Left out: 1 item (no such file, for example 4bcdefghijk)." in capsys.readouterr().out
    assert result(folder)["data"]["missing"] == ["4bcdefghijk"]


def test_clips_of_audioset_that_cannot_be_read_are_left_out_too(
    tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audioset(folder)
    write(folder / "wav" / "Y1bcdefghijk.wav", b"RIFF of nothing")
    for _ in range(2):
        assert run(tiny_model, folder, "audioset", "--template", "{}") == 0
        assert "1 item (cannot be read, for example wav/Y1bcdefghijk.wav)." in capsys.readouterr().out
    found = result(folder)
    assert found["data"]["unreadable"] == ["wav/Y1bcdefghijk.wav"]
    assert found["data"]["items"] == {"items": 3, "classes": 3}
    own = {"wav/Y0bcdefghijk.wav": "dog", "wav/Y2bcdefghijk.wav": "sea", "wav/Y3bcdefghijk.wav": "cat"}
    shown = [case["query"] for case in found["best"] + found["worst"]]
    assert shown
    assert all(query["label"] == own[query["name"]] for query in shown)


@pytest.mark.parametrize(
    ("layout", "write_layout", "lost", "whole_size"),
    [
        ("esc-50", write_esc50, "3.wav", 6),
        ("imagenet", write_imagenet, "n00000002/1.JPEG", None),
        ("modelnet40", write_modelnet40, "bathtub/test/1.off", 40),
    ],
)
def test_items_of_benchmarks_that_cannot_be_read_are_left_out_too(
    tiny_model: Path,
    tiny_ulip_model: Path,
    folder: Path,
    layout: str,
    write_layout: Any,
    lost: str,
    whole_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_layout(folder)
    if whole_size is not None:
        take_for_whole(monkeypatch, layout, whole_size)
    model = tiny_ulip_model if layout == "modelnet40" else tiny_model
    assert run(model, folder, layout, "--template", "{}") == 0
    whole = result(folder)
    write(folder / ("audio" if layout == "esc-50" else "") / lost, b"nothing")
    assert run(model, folder, layout, "--template", "{}") == 0
    found = result(folder)
    assert whole["data"]["unreadable"] == [] and found["data"]["unreadable"] == [lost]
    assert found["data"]["items"]["items"] == whole["data"]["items"]["items"] - 1
    # What is told apart stays the same.
    assert found["data"]["items"]["classes"] == whole["data"]["items"]["classes"]
    assert (bool(whole["published"]), found["published"]) == (whole_size is not None, [])
    assert f"Left out: 1 item (cannot be read, for example {lost})." in found["notes"]


@pytest.mark.parametrize("layout", ["folder", "table", "data set"])
def test_items_of_your_own_that_cannot_be_read_are_left_out(tiny_model: Path, folder: Path, layout: str) -> None:
    if layout == "folder":
        write_folder(folder)
        (broken,) = sorted((folder / "dog").iterdir())[:1]
        lost, options = f"dog/{broken.name}", ("--modality", "image")
        broken.write_bytes(b"no picture")
    elif layout == "table":
        write_table(folder)
        lost, options = "broken.wav", ("--modality", "audio", "--label", "kind")
        with (folder / "table.csv").open("a") as table:
            table.write("\ngone.wav,dog,x\nbroken.wav,cat,x")
        (folder / "broken.wav").write_bytes(b"no sound")
    else:
        datasets = pytest.importorskip("datasets")
        write_folder(folder / "media")
        cells = [path.read_bytes() for path in sorted((folder / "media" / "dog").iterdir())]
        rows = {"picture": [{"bytes": cell, "path": None} for cell in (*cells, b"no picture")]}
        rows["kind"] = ["dog"] * len(cells) + ["cat"]
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
        (folder / "set").mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "set" / "train.parquet")
        options = ("--modality", "image", "--label", "kind", "--column", "picture")
        lost = f"set/train/{len(cells)}/picture"
    data = {"table": "table.csv", "data set": "set"}.get(layout, "")
    assert run(tiny_model, folder, layout.replace("data set", "table"), *options, data=data) == 0
    found = result(folder)
    assert found["data"]["unreadable"] == [lost]
    assert found["data"]["missing"] == (["gone.wav"] if layout == "table" else [])
    missing = "1 item (no such file, for example gone.wav), " if layout == "table" else ""
    assert f"Left out: {missing}1 item (cannot be read, for example {lost})." in found["notes"]


def test_a_table_of_files_that_are_not_there_is_told_so(
    tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "table.csv", "sound,kind\na.wav,dog\nb.wav,cat")
    options = ("--modality", "audio", "--label", "kind")
    assert run(tiny_model, folder, "table", *options, data="table.csv") == 1
    assert "None of the files of table.csv is there, for example a.wav." in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "csv", "set"])
def test_a_class_that_is_a_list_is_refused(
    tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    cells: list[Any] = [["dog", "bell"], ["cat"]]
    rows = [{"sound": f"{row}.wav", "kind": cell} for row, cell in enumerate(cells)]
    for row in range(2):
        write(folder / f"{row}.wav", clip(row))
    name = f"table.{kind}"
    if kind == "jsonl":
        write(folder / name, "\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        write(folder / name, "sound,kind\n0.wav,\"['dog', 'bell']\"\n1.wav,cat")
    else:
        name = "set"
        (folder / name).mkdir()
        photos = [{"bytes": photo(row), "path": None} for row in range(2)]
        features = datasets.Features({"photo": datasets.Image(), "kind": datasets.List(datasets.Value("string"))})
        made = datasets.Dataset.from_dict({"photo": photos, "kind": cells}, features=features)
        made.to_parquet(folder / name / "train.parquet")
    modality, column = ("image", "photo") if kind == "set" else ("audio", "sound")
    options = ("--modality", modality, "--label", "kind", "--column", column)
    assert run(tiny_model, folder, "table", *options, data=name) == 1
    assert "Expected one class in a cell, got ['" in capsys.readouterr().err
    if kind != "set":
        with pytest.raises(ValueError, match="Expected one class in a cell, got "):
            load_pairs(str(folder / name), [("audio", "sound"), ("text", "sound"), ("class", "kind")])


def test_a_damaged_store_of_an_evaluation_is_made_anew_by_the_same_command(
    tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(folder)
    options = ("--modality", "audio", "--label", "kind")
    assert run(tiny_model, folder, "table", *options, data="table.csv") == 0
    (store,) = (folder.parent / "out" / "stores").glob("clap-audio-*")
    for damaged in (store / "shard-00000.safetensors", store / "manifest.json"):
        content = damaged.read_bytes()
        damaged.write_bytes(content[: len(content) // 2])
        assert run(tiny_model, folder, "table", *options, data="table.csv") == 1
        assert f"delete {store} and run again what made it." in capsys.readouterr().err
        damaged.write_bytes(content)
    shutil.rmtree(store)
    assert run(tiny_model, folder, "table", *options, data="table.csv") == 0


@pytest.mark.parametrize(
    ("layout", "more", "message"),
    [
        ("folder", (), "Expected --modality with --layout folder"),
        ("table", ("--modality", "audio"), "Expected --label COLUMN with --layout table"),
        ("esc-50", ("--modality", "audio"), "--modality goes with --layout folder and table, got esc-50"),
        ("folder", ("--modality", "image", "--fold", "1"), "--fold goes with --layout esc-50, got folder"),
        ("folder", ("--modality", "image", "--template", "a photo"), "Expected a template with one {}"),
        ("folder", ("--modality", "image", "--text-space", "ulip"), "Expected a space that embeds text"),
        ("folder", ("--modality", "point_cloud"), "There are no point_cloud items"),
        ("esc-50", (), "has to hold meta/esc50.csv"),
        ("audioset", (), "has to hold eval_segments.csv"),
        ("imagenet", (), "has to hold a folder CLASS/*.JPEG"),
        ("modelnet40", (), "has to hold shape_names.txt"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    tiny_model: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    write_folder(folder)
    assert run(tiny_model, folder, layout, *more) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cmcr evaluate: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_model_without_point_clouds_is_refused(
    tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_modelnet40(folder)
    assert run(tiny_model, folder, "modelnet40") == 1
    assert "embeds image, text, audio, expected text and point_cloud" in capsys.readouterr().err
