import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cmcr_hf.cli import main
from cmcr_hf.demo.concepts import CONCEPTS
from cmcr_hf.demo.drawing import draw
from cmcr_hf.demo.run import run_demo
from cmcr_hf.demo.synthesis import SAMPLING_RATE, synthesise
from cmcr_hf.evaluation import localization, localization_commands, proposals
from cmcr_hf.evaluation.localization import CENTRE, Located, Measured, draw_located
from cmcr_hf.evaluation.localization_data import SoundingPicture, SoundingPictures
from tests.evaluation.by_hand import evaluate
from tests.evaluation.sounding_folders import (
    write_extended_flickr_soundnet,
    write_extended_vgg_ss,
    write_flickr_soundnet,
    write_music,
    write_vgg_ss,
)
from tests.media import encode_audio

LAYOUTS = {"vgg-ss": write_vgg_ss, "flickr-soundnet": write_flickr_soundnet, "music": write_music}
EXTENDED = {
    "extended-vgg-ss": write_extended_vgg_ss,
    "extended-flickr-soundnet": write_extended_flickr_soundnet,
}


@pytest.mark.parametrize("method", ["proposals", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_in_its_layout_becomes_numbers_and_a_page(
    tmp_path: Path, tiny_model: Path, few_boxes: None, capsys: pytest.CaptureFixture[str], layout: str, method: str
) -> None:
    data = LAYOUTS[layout](tmp_path / "data")
    found = evaluate("localization", tiny_model, data, layout, tmp_path / "out", "--method", method)
    rows = found["metrics"]
    assert set(rows) == {"whole picture", "centre", "model"} | ({"chance"} if method == "proposals" else set())
    for row in rows.values():
        assert set(row["localization"]) == {"cIoU@0.5", "AUC"}
        assert all(0 <= value <= 1 for value in row["localization"].values())
    for name, (low, high) in found["intervals"]["model"]["localization"].items():
        assert low <= rows["model"]["localization"][name] <= high
    assert found["data"]["missing"] == found["data"]["unreadable"] == []
    assert len(found["data"]["fingerprint"]) == 3
    assert found["settings"]["method"] == method
    assert str(tmp_path) not in json.dumps(found)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:audio/mpeg") == page.count('class="overlay"') == len(found["best"]) + len(found["worst"])
    assert "cIoU@0.5" in capsys.readouterr().out


def test_a_second_run_embeds_nothing_and_writes_the_same(
    tmp_path: Path, tiny_model: Path, detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_vgg_ss(tmp_path / "data")
    run = ("localization", tiny_model, data, "vgg-ss", tmp_path / "out", "--detector", str(detector))
    first = evaluate(*run)
    assert first["settings"]["detector"]["id"] == detector.name
    page = (tmp_path / "out" / "report.html").read_bytes()

    def fail(*arguments: object, **keywords: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("cmcr_hf.training.embed.encode_features", fail)
    monkeypatch.setattr(proposals.Detector, "boxes", fail)
    assert evaluate(*run) == first
    assert (tmp_path / "out" / "report.html").read_bytes() == page


@pytest.mark.parametrize("method", ["proposals", "dense"])
def test_another_folder_gets_the_same_numbers(tmp_path: Path, tiny_model: Path, few_boxes: None, method: str) -> None:
    data = write_vgg_ss(tmp_path / "data")
    found = []
    for name in ("one", "other"):
        result = evaluate("localization", tiny_model, data, "vgg-ss", tmp_path / name, "--method", method)
        del result["settings"]["command"]
        found.append(result)
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def collages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two things side by side in noise and the sound of the left one, and as often of a third, as Extended VGG-SS."""
    folder = tmp_path_factory.mktemp("collages")
    (folder / "frames").mkdir()
    (folder / "audio").mkdir()
    draws = np.random.default_rng(0)
    concepts = list(CONCEPTS)
    entries, silent = [], ["video,audio,label"]
    for number in range(40):
        left, right, other = (concepts[place] for place in draws.choice(len(concepts), 3, replace=False))
        collage = Image.fromarray(draws.integers(90, 160, (180, 240, 3), dtype=np.uint8))
        side, x, y = int(draws.integers(80, 111)), int(draws.integers(10)), int(draws.integers(70))
        collage.paste(draw(left, draws).resize((side, side)), (x, y))
        collage.paste(draw(right, draws).resize((100, 100)), (125, 40))
        name, foreign = f"video{number}_0", f"sound{number}_0"
        collage.save(folder / "frames" / f"{name}.png")
        for sound, concept in ((name, left), (foreign, other)):
            clip = encode_audio(synthesise(concept, draws), SAMPLING_RATE)
            (folder / "audio" / f"{sound}.wav").write_bytes(clip)
        box = [x / 240, y / 180, (x + side) / 240, (y + side) / 180]
        entries.append({"file": name, "class": left, "bbox": [box]})
        silent.append(f"{name},{foreign},non-sounding")
    (folder / "vggss.json").write_text(json.dumps(entries))
    (folder / "vggss_test_plus_silent.csv").write_text("\n".join(silent))
    return folder


@pytest.mark.slow
def test_a_model_that_never_saw_a_pair_finds_what_sounds(tmp_path: Path, collages: Path) -> None:
    run_demo(tmp_path / "demo", seeds=1, derangements=0, report=lambda line: None)
    model = tmp_path / "demo" / "model"
    found = evaluate("localization", model, collages, "vgg-ss", tmp_path / "out")
    rates = {name: row["localization"]["cIoU@0.5"] for name, row in found["metrics"].items()}
    assert rates["model"] > 0.4
    assert rates["model"] > 4 * max(rates["chance"], rates["whole picture"], rates["centre"])
    found = evaluate("recognition", model, collages, "extended-vgg-ss", tmp_path / "out")
    assert found["metrics"]["model"]["recognition"]["AP"] > 0.75
    assert found["metrics"]["all accepted"]["recognition"]["AP"] == 0.5


@pytest.mark.parametrize("method", ["proposals", "dense"])
@pytest.mark.parametrize("layout", EXTENDED)
def test_an_extended_folder_becomes_both_forms_of_recognition(
    tmp_path: Path, tiny_model: Path, few_boxes: None, layout: str, method: str
) -> None:
    data = EXTENDED[layout](tmp_path / "data")
    confidence = "region" if method == "dense" else "picture"
    more = ("--method", method, "--confidence", confidence)
    found = evaluate("recognition", tiny_model, data, layout, tmp_path / "out", *more)
    model, flat = found["metrics"]["model"], found["metrics"]["all accepted"]
    assert set(model) == {"recognition", "located recognition", "localization"}
    for group in ("recognition", "located recognition"):
        assert set(model[group]) == {"AP", "max-F1"}
        assert 0 <= model[group]["AP"] <= 1
    assert model["located recognition"]["AP"] <= model["recognition"]["AP"]
    silent = found["data"]["items"]["non-sounding"]
    share = 1 - silent / found["data"]["items"]["pairs"]
    assert flat["recognition"]["AP"] == pytest.approx(share)
    assert flat["recognition"]["max-F1"] == pytest.approx(2 * share / (1 + share))
    assert found["settings"]["confidence_of"] == confidence and found["published"] == []
    assert {case["query"]["label"] == "non-sounding" for case in found["best"] + found["worst"]} == {True, False}


def test_the_threshold_of_a_dense_map_changes_what_is_located(tmp_path: Path, tiny_model: Path) -> None:
    data = write_vgg_ss(tmp_path / "data")
    found = {
        threshold: evaluate(
            "localization",
            tiny_model,
            data,
            "vgg-ss",
            tmp_path / "out",
            "--method",
            "dense",
            "--threshold",
            threshold,
        )
        for threshold in ("half", "middle")
    }
    assert [found[name]["settings"]["threshold"] for name in found] == list(found)
    scores = [[case["score"] for case in found[name]["best"]] for name in found]
    assert scores[0] != scores[1]
    assert "Half of every picture" in found["half"]["notes"][0]
    assert found["middle"]["notes"] == found["half"]["notes"][1:]
    assert "the boxes of the data set are green" in found["middle"]["notes"][0]


def test_a_limit_takes_as_many_silent_pairs_and_no_resamples_give_no_intervals(
    tmp_path: Path, tiny_model: Path, few_boxes: None
) -> None:
    data = write_extended_flickr_soundnet(tmp_path / "data")
    more = ("--limit", "4", "--bootstrap", "0")
    found = evaluate("recognition", tiny_model, data, "extended-flickr-soundnet", tmp_path / "out", *more)
    assert found["data"]["items"] == {"pairs": 4, "videos": 2, "non-sounding": 2}
    assert not any(found["intervals"]["model"].values())
    assert not found["published"]
    assert "Published numbers are of the whole data set, so none stand here." in found["notes"]


def test_cases_are_of_several_classes_where_there_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [*["dog"] * 6, *"abcdefghijklmn"]
    pairs = [SoundingPicture(str(row), "image", "audio", (), label, str(row)) for row, label in enumerate(labels)]
    monkeypatch.setattr(localization, "draw_located", lambda *_: None)
    data = SoundingPictures(tmp_path, pairs, 1, [])
    measured = Measured({}, {}, np.linspace(0, 1, 20), [""] * 20)
    best, worst = localization_commands._cases(SimpleNamespace(locate=lambda pair: None), data, measured)
    assert [case.query.label for case in best] == [*"nmlkjihg"]
    # All others of the worse half, and dogs for want of more.
    assert [case.query.label for case in worst] == [*["dog"] * 4, *"abcd"]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["evaluate", *map(str, words)]) == 1
    return capsys.readouterr().err


def test_bad_input_is_told_in_one_line(
    tmp_path: Path, tiny_model: Path, few_boxes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_vgg_ss(tmp_path / "data")
    run = ("localization", "--model", tiny_model, "--layout", "vgg-ss", "--output", tmp_path / "out", "--data")
    assert "vggss.json of github.com/hche11" in refused(capsys, *run, tmp_path / "nothing")
    assert "--method dense has none" in refused(capsys, *run, data, "--method", "dense", "--detector", "x")
    message = refused(capsys, *run, data, "--detector", tmp_path / "nothing")
    assert "Cannot load the detector" in message
    assert "facebook/detr-resnet-50" in message
    for picture in (data / "frames").iterdir():
        picture.write_bytes(b"no picture")
    message = refused(capsys, *run, data)
    assert "zpWuikVorYg_000032" in message
    assert message.splitlines()[-1].startswith("cmcr evaluate:")


@pytest.mark.parametrize("way", ["grid", "detector", "dense"])
def test_pictures_and_sounds_that_cannot_be_read_are_left_out_and_listed(
    tmp_path: Path, tiny_model: Path, detector: Path, few_boxes: None, way: str
) -> None:
    broken = ["frames/zpWuikVorYg_000032.jpg", "audio/-d1KR2BSfHM_000065.wav"]
    whole, data = (write_vgg_ss(tmp_path / name) for name in ("whole", "data"))
    for name in broken:
        (data / name).write_bytes(b"nothing")
        (whole / name).unlink()
    more = {"grid": (), "detector": ("--detector", str(detector)), "dense": ("--method", "dense")}[way]
    expected = evaluate("localization", tiny_model, whole, "vgg-ss", tmp_path / "one", *more)
    for _ in range(2):
        found = evaluate("localization", tiny_model, data, "vgg-ss", tmp_path / "other", *more)
    assert found["data"]["items"] == {"pairs": 2, "videos": 2}
    assert found["data"]["unreadable"] == broken and expected["data"]["unreadable"] == []
    assert f"Left out: 2 items (cannot be read, for example {broken[0]})." in found["notes"]
    assert found["published"] == []
    for method, row in expected["metrics"].items():
        assert found["metrics"][method]["localization"] == pytest.approx(row["localization"])
    assert [case["score"] for case in found["best"]] == pytest.approx([case["score"] for case in expected["best"]])


def test_recognition_leaves_out_what_cannot_be_read_too(tmp_path: Path, tiny_model: Path, few_boxes: None) -> None:
    data = write_extended_vgg_ss(tmp_path / "data")
    (data / "frames" / "9PmzQI8ZYpg_000147.jpg").write_bytes(b"no picture")
    (data / "audio" / "zpWuikVorYg_000032.wav").write_bytes(b"no sound")
    more = ("--confidence", "picture")
    found = evaluate("recognition", tiny_model, data, "extended-vgg-ss", tmp_path / "out", *more)
    assert found["data"]["items"] == {"pairs": 5, "videos": 5, "non-sounding": 2}
    assert found["data"]["unreadable"] == ["frames/9PmzQI8ZYpg_000147.jpg", "audio/zpWuikVorYg_000032.wav"]
    assert found["published"] == []


def test_drawn_pictures_have_the_boxes_of_annotators_in_green_and_the_answer_in_red() -> None:
    pixels = np.zeros((224, 224), bool)
    pixels[:, :112] = True
    located = Located(pixels, pixels.astype(float), 1.0, np.array([0, 0, 0.5, 1]))
    pair = SoundingPicture("key", "image", "audio", ((0.5, 0.5, 1, 1), (0.2, 1, 0.4, 1)), None, "video")
    drawn = np.asarray(draw_located(Image.new("RGB", (960, 480), "white"), pair, located))
    assert drawn.shape == (240, 480, 3)
    assert drawn[120, 0].tolist() == [255, 0, 0]
    assert drawn[239, 400].tolist() == [0, 255, 0]
    # The answer bright with heat, the rest dark without.
    assert drawn[60, 100].tolist() == [255, 255, 127]
    assert drawn[60, 400].tolist() == [127, 127, 127]


def test_the_centre_has_half_of_the_area() -> None:
    left, top, right, bottom = CENTRE[0]
    assert (right - left) * (bottom - top) == pytest.approx(0.5)
    assert left == top == pytest.approx(1 - right)
