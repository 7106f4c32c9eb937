"""The walk of a recipe that connects CLIP and ULIP through images."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cmcr_hf.connect import connect
from cmcr_hf.evaluation.connection import CLASSIFICATION, connector_metrics
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector, CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from cmcr_hf.training.recipe import DataSpec, EvaluateSpec, Recipe, SourceSpec, TrainSpec
from cmcr_hf.training.store import EmbeddingStore

pytestmark = pytest.mark.usefixtures("quick_linear_map")

KINDS = ("bell", "cat", "dog")
WAYS = [f"{a}_to_{b}" for c in ("image", "text") for a, b in (("point_cloud", c), (c, "point_cloud"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random pictures, clouds and sentences of three classes: enough to walk a recipe, nothing to be learnt."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("", 4), ("test_", 2)):
        for kind in KINDS:
            images, clouds = root / f"{split}images" / kind, root / f"{split}clouds" / kind
            images.mkdir(parents=True)
            clouds.mkdir(parents=True)
            for row in range(count):
                Image.fromarray(generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(images / f"{row}.png")
                np.save(clouds / f"{row}.npy", generator.normal(size=(30, 3)).astype(np.float32))
    for name, words in (
        ("texts", ("small", "red", "loud")),
        ("test_texts", ("the",)),
        ("names", ("a", "the sound of a")),
    ):
        rows = [f"{word} {kind},{kind}" for kind in KINDS for word in words]
        (root / f"{name}.csv").write_text("text,concept\n" + "\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def recipe(tiny_clip, tiny_ulip):
    return Recipe(
        name="tiny",
        sources={"clip": SourceSpec(str(tiny_clip)), "ulip": SourceSpec(str(tiny_ulip))},
        image=[DataSpec(folder="images")],
        text=[DataSpec(table="texts.csv", column="text")],
        point_cloud=[DataSpec(folder="clouds")],
        connector={"objective": "c-mcr", "projection_dim": 8},
        train=TrainSpec(epochs=3, batch_size=4),
        evaluate=EvaluateSpec(
            point_cloud=DataSpec(folder="test_clouds", label="parent"),
            image=DataSpec(folder="test_images", label="parent"),
            text=DataSpec(table="test_texts.csv", column="text", label="concept"),
            names=DataSpec(table="names.csv", column="text", label="concept"),
        ),
    )


@pytest.fixture(scope="module")
def finished(recipe, data, tmp_path_factory):
    return connect(recipe, tmp_path_factory.mktemp("runs") / "whole", data, command="cmcr connect tiny")


def test_images_are_embedded_in_both_spaces_and_get_pseudo_texts_and_clouds(finished):
    stores = {path.name: EmbeddingStore.open(path) for path in (finished.folder / "stores").iterdir()}
    assert {name: (store.rows, store.dim) for name, store in stores.items()} == {
        "clip-image": (12, 24),
        "ulip-image": (12, 12),
        "clip-text": (9, 24),
        "ulip-point_cloud": (12, 12),
        "evaluate-ulip-point_cloud": (6, 12),
        "evaluate-clip-image": (6, 24),
        "evaluate-clip-text": (3, 24),
        "evaluate-clip-names": (6, 24),
    }
    embeds = finished.training_embeds("ulip")["image"]
    assert list(embeds) == ["clip_image", "ulip_image", "clip_text", "ulip_point_cloud"]
    memory = stores["ulip-point_cloud"].tensor().double()
    expected = torch.softmax(embeds["ulip_image"].double() @ memory.T / 0.01, dim=1) @ memory
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embeds["ulip_point_cloud"].double(), expected, atol=1e-5, rtol=0)


def test_images_of_the_ulip_space_are_those_of_its_own_tower(finished, tiny_ulip, data):
    model = CMCRModel.from_pretrained(finished.folder / "model")
    processor = CMCRProcessor.from_pretrained(finished.folder / "model")
    path = data / "images" / "bell" / "0.png"
    with torch.no_grad():
        expected = model.ulip.get_image_features(**processor(images=path, space="ulip")).pooler_output[0]
    found = EmbeddingStore.open(finished.folder / "stores" / "ulip-image").tensor()[0]
    torch.testing.assert_close(found, expected / expected.norm(), atol=1e-5, rtol=0)


def test_clouds_are_measured_with_images_with_texts_and_by_names(finished):
    table = json.loads((finished.folder / "evaluation.json").read_text())["metrics"]
    assert table == finished.table
    assert list(finished.table["C-MCR"]) == [*WAYS, CLASSIFICATION]
    assert table["chance"][CLASSIFICATION] == pytest.approx({"top-1": 1 / 3, "top-3": 1.0})
    # Names cannot be embedded by a ULIP without a text tower, and these widths have no cosine.
    assert not {"closed cascade", "unconnected"} & set(table)
    connector = CMCRConnector.from_pretrained(finished.folder / "connector")
    assert finished.table["C-MCR"] == connector_metrics(connector, finished.sets)


def test_the_zero_shot_accuracy_is_that_of_the_saved_model(finished, data):
    model = CMCRModel.from_pretrained(finished.folder / "model")
    processor = CMCRProcessor.from_pretrained(finished.folder / "model")
    prompts = [f"{words} {kind}" for kind in KINDS for words in ("a", "the sound of a")]
    clouds = [path for kind in KINDS for path in sorted((data / "test_clouds" / kind).iterdir())]
    with torch.no_grad():
        # Prompts are averaged in the source space, before the projector.
        texts = model.clip.get_text_features(**processor(text=prompts)).pooler_output
        texts = torch.nn.functional.normalize(texts, dim=-1).view(3, 2, -1).mean(dim=1)
        names = model.connector.project(texts, "clip")
        scores = model.get_point_cloud_features(**processor(point_clouds=clouds)).pooler_output @ names.T
    hits = (scores.argmax(dim=1) == torch.arange(3).repeat_interleave(2)).double().mean().item()
    assert finished.table["C-MCR"][CLASSIFICATION]["top-1"] == pytest.approx(hits)


def test_the_page_shows_clouds_and_the_pictures_they_find(finished):
    html = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "<audio" not in html
    # Six clouds, each with five of the six pictures.
    assert html.count("data:image/jpeg;base64,") == 6 + 30
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "Point clouds, and the pictures they find" in text
    assert "0 pairs of point cloud and text in the training" in text
    assert "the linear map that carries the pictures of one space onto those of the other" in text
    assert "in 5 comparisons" in text or "of 5 comparisons" in text or "throughout" in text


def test_the_card_names_what_connects(finished):
    card = (finished.folder / "model" / "README.md").read_text()
    assert "| images | the images that connect | 12 | not stated |" in card
    assert "| clouds | point cloud memory | 12 | not stated |" in card
    assert "get_point_cloud_features" in card
    assert "get_audio_features" not in card


def test_the_same_walk_keeps_what_is_there(finished, recipe, data):
    lines = []
    connect(recipe, finished.folder, data, report=lines.append, command="cmcr connect tiny")
    assert any(line.startswith("train: kept") for line in lines)


def test_a_ulip_without_the_tower_that_connects_is_refused(recipe, data, tmp_path):
    text = replace(recipe, connector={**recipe.connector, "bridges": [["clip", "ulip", "text"]]})
    with pytest.raises(ValueError, match=r"The ulip source .* has no text tower, which is to connect it"):
        connect(text, tmp_path, data)


def test_a_ulip_with_a_text_tower_is_connected_through_texts(recipe, tiny_text_ulip, data, tmp_path):
    sources = {**recipe.sources, "ulip": SourceSpec(str(tiny_text_ulip))}
    connector = {**recipe.connector, "bridges": [["clip", "ulip", "text"]]}
    done = connect(replace(recipe, sources=sources, connector=connector), tmp_path, data)
    assert list(done.training_embeds("ulip")["text"]) == ["clip_text", "ulip_text", "clip_image", "ulip_point_cloud"]
    # Names in both spaces make the closed cascade.
    assert "closed cascade" in done.table


def test_a_class_that_only_clouds_have_is_named(recipe, data, tmp_path):
    (tmp_path / "names.csv").write_text("text,concept\na bell,bell\na dog,dog\n")
    names = DataSpec(table=str(tmp_path / "names.csv"), column="text", label="concept")
    with pytest.raises(ValueError, match="The class 'cat', one of 1 such, has point_cloud items but no names"):
        connect(replace(recipe, evaluate=replace(recipe.evaluate, names=names)), tmp_path / "out", data)
    # Before any work.
    assert not (tmp_path / "out").exists()


def test_a_cloud_smaller_than_a_group_is_named(recipe, data, tmp_path):
    (tmp_path / "clouds").mkdir()
    np.save(tmp_path / "clouds" / "0.npy", np.zeros((20, 3)))
    np.save(tmp_path / "clouds" / "1.npy", np.zeros((5, 3)))
    small = replace(recipe, point_cloud=[DataSpec(folder=str(tmp_path / "clouds"))])
    with pytest.raises(ValueError, match=r"with at least 8 points, .* got 5\. Leave it out\. \(item '1\.npy'\)"):
        connect(small, tmp_path / "out", data)


def test_bridge_distillation_connects_texts_and_clouds_through_images(recipe, data, tmp_path):
    done = connect(
        replace(recipe, connector={"projection_dim": 8, "objective": "bridge-distillation"}), tmp_path / "run", data
    )
    embeds = done.training_embeds("ulip")["image"]
    rows = {name: len(part) for name, part in embeds.items()}
    assert rows == {"clip_image": 12, "ulip_image": 12, "clip_text": 9, "ulip_point_cloud": 12}
    assert set(done.model.config.posterior_temperatures) == {"clip", "ulip"}
    assert set(done.table["bridge distillation"]) == {*WAYS, CLASSIFICATION}
