import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.nn.functional import normalize

from cmcr_hf import CMCRConfig, CMCRConnector
from cmcr_hf.evaluation.baselines import TRAINING_FREE
from cmcr_hf.evaluation.connection import ROWS, RetrievalSet, Side, baseline_metrics, connector_metrics
from cmcr_hf.pages import report as page
from cmcr_hf.pages.report import METHODS, write_report
from cmcr_hf.training.data import Item
from cmcr_hf.training.recipe import DataSpec, Recipe, SourceSpec

MODALITIES = {"query": "audio", "gallery": "image"}
HISTORY = [
    {"step": step, "loss": 4.0 / step, "loss_overlap": 2.0 / step, "loss_leaf": 1.9 / step, "loss_intra": 1.0 / step}
    for step in (1, 2, 4)
]


def metrics(value):
    return {way: {"P@1": value, "P@10": value, "mAP": value} for way in ("audio_to_image", "image_to_audio")}


def made(labels, *, audio_dim=16, image_dim=24):
    """Random unit rows for two sides with these classes, and a random connector: there is nothing to be found."""
    generator = torch.Generator().manual_seed(0)

    def rows(count, dim):
        return normalize(torch.randn(count, dim, generator=generator), dim=-1)

    query = Side("clap", "audio", rows(len(labels), audio_dim), labels)
    gallery = Side("clip", "image", rows(len(labels), image_dim), labels)
    sets = [RetrievalSet(query, gallery, rows(40, audio_dim), rows(40, image_dim))]
    torch.manual_seed(0)
    projectors = {"clip": {"input_dim": image_dim}, "clap": {"input_dim": audio_dim}}
    connector = CMCRConnector(CMCRConfig(projectors=projectors, projection_dim=8)).eval()
    media = {
        modality: [Item(f"{label}/{row}.{suffix}", None, label) for row, label in enumerate(labels)]
        for modality, suffix in (("audio", "wav"), ("image", "png"))
    }
    # Measured where that takes no time.
    table = {name: metrics(0.5) for name in ("chance", "one-way bridge", "C-MCR")}
    if len(labels) <= 20:
        table = {**baseline_metrics(sets), "C-MCR": connector_metrics(connector, sets)}
    recipe = Recipe(
        name="tiny",
        sources={"clip": SourceSpec("org/clip", licence="MIT"), "clap": SourceSpec("org/clap")},
        text=[DataSpec(table="texts.csv")],
        image=[DataSpec(folder="images")],
        audio=[DataSpec(folder="sounds")],
        connector={"objective": "c-mcr"},
    )
    return {
        "recipe": recipe,
        "connector": connector,
        "sets": sets,
        "media": media,
        "table": table,
        "histories": {"clap": HISTORY},
        "data": [{"name": "texts.csv", "role": "the texts that connect", "rows": 40, "licence": "CC0-1.0"}],
        "command": "cmcr connect tiny.yaml",
    }


def written(tmp_path, arguments):
    write_report(tmp_path / "report.html", **arguments)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def text_of(html):
    """Return what a reader sees, in one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)).split())


@pytest.fixture
def arguments():
    return made(["cat", "dog", "bell", "sea"] * 4)


def test_the_page_names_recipe_sources_data_licences_and_command(arguments, tmp_path):
    text = text_of(written(tmp_path, arguments))
    for part in ("tiny: what the connection found", "cmcr connect tiny.yaml", "org/clip CLIP, frozen MIT"):
        assert part in text
    assert "org/clap CLAP, frozen not stated" in text
    assert "texts.csv the texts that connect 40 CC0-1.0" in text
    assert "synthetic" not in text


def test_a_synthetic_world_is_called_so(arguments, tmp_path):
    arguments["recipe"].world = {"images": 2}
    assert "Everything on this page is synthetic" in text_of(written(tmp_path, arguments))


def test_the_same_arguments_give_the_same_bytes(arguments, tmp_path):
    assert written(tmp_path, arguments) == written(tmp_path, arguments)


def test_a_page_loads_nothing_and_runs_nothing(arguments, tmp_path):
    html = written(tmp_path, arguments)
    assert not re.findall(r"<script|<link|<iframe|\son\w+=|https?://|url\(|@import", html)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', html))


def test_every_element_is_closed(arguments, tmp_path):
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.wrong = [], []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            if not self.open or self.open.pop() != tag:
                self.wrong.append(tag)

    tags = Tags()
    tags.feed(written(tmp_path, arguments))
    assert (tags.open, tags.wrong) == ([], [])


def test_what_users_name_is_text_and_never_markup(tmp_path):
    evil = '"><script>alert(1)</script>'
    arguments = made([evil, "dog"] * 3)
    arguments["recipe"].name = arguments["recipe"].description = arguments["command"] = evil
    arguments["recipe"].sources["clip"].licence = evil
    arguments["data"] = [{"name": evil, "role": evil, "rows": 1, "licence": evil}]
    html = written(tmp_path, arguments)
    assert "<script" not in html
    # Class, file name, recipe, licence and the class in the drawings.
    assert html.count("&lt;script&gt;alert(1)") > 10


@pytest.mark.parametrize(
    ("value", "deviation", "lead", "answer", "order"),
    [
        (0.9, 0.01, (-0.15, -0.05), "Yes, in both directions.", "above"),
        (0.81, 0.02, (-0.015, -0.005), "No, it is level in both directions.", "level with"),
        (0.9, 0.01, (-0.21, 0.01), "No, it is level in both directions.", "level with"),
        (0.5, 0.02, (0.25, 0.35), "No, in neither direction.", "below"),
        (0.5, 0.02, (-0.01, 0.61), "No, it is level in both directions.", "level with"),
    ],
)
def test_the_answer_follows_from_the_numbers(arguments, tmp_path, value, deviation, lead, answer, order):
    arguments["differences"] = {way: {"one-way bridge": lead} for way in ("audio_to_image", "image_to_audio")}
    arguments["table"] = {
        "chance": metrics(0.1),
        "one-way bridge": metrics(0.8),
        "two-way bridge": metrics(0.7),
        "closed cascade": metrics(0.99),
        "C-MCR, 3 seeds": metrics(value),
        "null, 5 derangements": metrics(0.1),
    }
    arguments["spread"] = {"C-MCR, 3 seeds": metrics(deviation), "null, 5 derangements": metrics(0.02)}
    text = text_of(written(tmp_path, arguments))
    assert answer in text
    assert "From here on, the page shows one of the trainings" in text
    ours = f"mAP of {value:.3f} ±{deviation:.3f}"
    told = f"{lead[0]:.3f} to {lead[1]:.3f}, a 95 % interval".replace("-", "\N{MINUS SIGN}")
    sentence = (
        f"{ours} is {order} the best training-free method's, one-way bridge at 0.800 (one-way bridge's lead: {told})."
    )
    assert text.count(sentence) == 2
    assert ("the training-free method ranks better" in text) == (order == "below")
    assert text.count("The null reaches 0.100 ±0.020: what is found is owed to the texts") == 2


@pytest.mark.parametrize("value", [0.9, 0.5])
def test_no_method_is_said_to_rank_better_without_a_test(arguments, tmp_path, value):
    arguments["table"] |= {name: metrics(0.6) for name in TRAINING_FREE} | {"C-MCR": metrics(value)}
    text = text_of(written(tmp_path, arguments))
    assert "That was not tested." in text
    stands = f"mAP of {value:.3f} stands beside the best training-free method's, one-way bridge at 0.600."
    assert text.count(stands) == 2
    assert not re.search("ranks better|Yes, in|No, |is above|is below|level", text)


def test_a_connection_that_is_no_better_than_the_null_is_called_so(arguments, tmp_path):
    arguments["table"] |= {"C-MCR": metrics(0.12), "null, 5 derangements": metrics(0.11)}
    arguments["spread"] = {"null, 5 derangements": metrics(0.02)}
    assert text_of(written(tmp_path, arguments)).count("the connection is not clearly above it") == 2


def test_a_single_training_says_that_its_spread_is_unknown(arguments, tmp_path):
    text = text_of(written(tmp_path, arguments))
    assert "how much another seed would change it is not measured" in text
    assert "No null" in text
    assert "±0" not in text


def test_a_table_without_the_connection_is_refused(arguments, tmp_path):
    del arguments["table"]["C-MCR"]
    with pytest.raises(ValueError, match="expected C-MCR among them"):
        written(tmp_path, arguments)


def test_every_method_has_its_bar_with_chance_and_whiskers(arguments, tmp_path):
    arguments["spread"] = {"C-MCR": metrics(0.05)}
    arguments["table"] = {"chance": metrics(0.25), "one-way bridge": metrics(0.5), "C-MCR": metrics(0.97)}
    html = written(tmp_path, arguments)
    # A direction and a metric: six bars a method.
    assert html.count('<rect class="fill" width="50.0"') == 6
    assert html.count('<line class="chance" x1="25.0"') == 18
    # The whiskers end with the scale.
    assert html.count('d="M92.0 2V10M92.0 6H100.0M100.0 2V10"') == 6


def test_300_classes_are_a_pixel_each(tmp_path):
    html = written(tmp_path, made([f"class {index:03d}" for index in range(300)]))
    assert len(html) < 3_000_000
    assert "One pixel a pair of classes" in text_of(html)
    uri = re.search(r'class="pixels" src="data:image/png;base64,([^"]*)"', html)[1]
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (300, 300)


def test_a_single_item_of_a_single_class_has_a_page(tmp_path):
    text = text_of(written(tmp_path, made(["dog"])))
    assert "1 test sound 1 test picture 1 class " in text
    assert "For 1 of 1 class " in text
    assert "mean cosine of a sound and a picture of another class there is none" in text


def test_spaces_of_one_width_are_compared_before_and_after(tmp_path):
    text = text_of(written(tmp_path, made(["cat", "dog"] * 3, audio_dim=16, image_dim=16)))
    assert "taken as if the spaces were one" in text
    assert "each is drawn by itself" not in text
    assert text.count("6 sounds and 6 pictures; the plane holds") == 4


def test_spaces_of_different_widths_are_drawn_each_by_itself(arguments, tmp_path):
    text = text_of(written(tmp_path, arguments))
    assert "The source spaces have 16 and 24 dimensions" in text
    assert "Before: sounds in CLAP" in text and "Before: pictures in CLIP" in text
    assert text.count("16 sounds and 16 pictures; the plane holds") == 2


def test_a_large_gallery_is_drawn_with_a_stated_number_of_points(tmp_path):
    html = written(tmp_path, made(["cat", "dog"] * 2000))
    assert "400 of the 4,000 sounds, evenly taken" in text_of(html)
    assert len(html) < 1_000_000


def test_a_missing_log_is_said_to_be_missing(arguments, tmp_path):
    arguments["histories"] = {}
    text = text_of(written(tmp_path, arguments))
    assert "There is no log of the training" in text
    assert "loss_overlap" not in text


def test_the_figures_of_held_out_texts_are_shown(arguments, tmp_path):
    held_out = {"step": 4, "eval_loss": 1.5, "eval_a_to_b_R@1": 0.25, "eval_runtime": 3.0}
    arguments["histories"] = {"clap": [*HISTORY, held_out]}
    text = text_of(written(tmp_path, arguments))
    assert "loss 1.500 a_to_b_R@1 0.250" in text
    assert "runtime" not in text


def test_a_dozen_sounds_are_spread_over_the_classes():
    labels = [f"class {index // 2:02d}" for index in range(60)]
    projected = {"query": torch.eye(60), "gallery": torch.eye(60)}
    media = {side: [Item(f"{side} {row}", None, label) for row, label in enumerate(labels)] for side in projected}
    sounds = page._queries(projected, {"query": labels, "gallery": labels}, media, MODALITIES)
    assert [sound["label"] for sound in sounds[:3]] == ["class 00", "class 02", "class 05"]
    assert len({sound["label"] for sound in sounds}) == len(sounds) == 12
    # Each row finds itself first.
    assert all(sound["results"][0]["name"] == sound["name"].replace("query", "gallery") for sound in sounds)
    assert all(sound["results"][0]["right"] and sound["results"][0]["cosine"] == 1 for sound in sounds)


def test_few_classes_give_several_sounds_each():
    labels = ["cat", "dog"] * 3
    projected = {"query": torch.eye(6), "gallery": torch.eye(6)}
    media = {side: [Item(str(row), None, label) for row, label in enumerate(labels)] for side in projected}
    sounds = page._queries(projected, {"query": labels, "gallery": labels}, media, MODALITIES)
    assert [sound["name"] for sound in sounds] == ["0", "1", "2", "3", "4", "5"]
    assert len(sounds[0]["results"]) == 5
    assert [result["right"] for result in sounds[0]["results"]].count(False) == 2


def test_right_and_wrong_are_told_by_words_and_signs(arguments, tmp_path):
    html = written(tmp_path, arguments)
    marks = re.findall(r'role="img" aria-label="(right|wrong)">(.)<', html)
    assert len(marks) == 12 * 5
    assert set(marks) == {("right", "✓"), ("wrong", "✗")}


def test_files_are_shown_and_what_cannot_be_read_is_named(arguments, tmp_path):
    for row, (sound, picture) in enumerate(zip(*arguments["media"].values(), strict=True)):
        sound.value, picture.value = tmp_path / f"{row}.wav", tmp_path / f"{row}.png"
        soundfile.write(sound.value, np.full(800, 0.1), 8000)
        Image.new("RGB", (20, 10), "green").save(picture.value)
    html = written(tmp_path, arguments)
    assert html.count("data:audio/mpeg;base64,") == 12
    assert html.count("data:image/jpeg;base64,") == 60
    (tmp_path / "0.wav").write_bytes(b"")
    (tmp_path / "1.png").unlink()
    html = written(tmp_path, arguments)
    assert html.count("data:audio/mpeg;base64,") == 11
    assert "Not shown: cannot be read." in text_of(html)
    assert str(tmp_path) not in html


def test_items_that_are_no_files_are_named_without_media(arguments, tmp_path):
    text = text_of(written(tmp_path, arguments))
    assert "sounds and pictures of this evaluation are not files of a folder" in text
    assert "Not shown" not in text
    assert "bell/2.wav" in text


def test_every_objective_is_told_as_trained_and_explained() -> None:
    assert {METHODS[row][0] for row in ROWS.values()} == {"trained"}
