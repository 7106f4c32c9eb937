"""The walk of a recipe that extends CLAP and ULIP into CLIP, and of pools that are centred on other modalities."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file

from cmcr_hf import connect as walk
from cmcr_hf.connect import connect
from cmcr_hf.evaluation.connection import CLASSIFICATION, connector_metrics
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector, CMCRModel
from cmcr_hf.training import aggregate_stores
from cmcr_hf.training.recipe import DataSpec, EvaluateSpec, Recipe, SourceSpec, TrainSpec
from cmcr_hf.training.store import EmbeddingStore

pytestmark = pytest.mark.usefixtures("quick_linear_map")

KINDS = ("bell", "cat", "dog")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random pictures, sounds, clouds and sentences of three classes: nothing to be learnt."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, count in (("", 3), ("test_", 2)):
        for kind in KINDS:
            folders = {name: root / f"{split}{name}" / kind for name in ("images", "sounds", "clouds")}
            for folder in folders.values():
                folder.mkdir(parents=True)
            for row in range(count):
                pixels = generator.integers(0, 256, (9, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folders["images"] / f"{row}.png")
                soundfile.write(folders["sounds"] / f"{row}.wav", generator.uniform(-0.5, 0.5, 2000), 8000)
                np.save(folders["clouds"] / f"{row}.npy", generator.normal(size=(30, 3)).astype(np.float32))
    for name, words in (("texts", ("small", "red", "loud", "the")), ("names", ("a",))):
        rows = [f"{word} {kind},{kind}" for kind in KINDS for word in words]
        (root / f"{name}.csv").write_text("text,concept\n" + "\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def recipe(tiny_clip, tiny_clap, tiny_ulip):
    return Recipe(
        name="tiny",
        sources={
            "clip": SourceSpec(str(tiny_clip)),
            "clap": SourceSpec(str(tiny_clap)),
            "ulip": SourceSpec(str(tiny_ulip)),
        },
        text=[DataSpec(table="texts.csv", column="text")],
        image=[DataSpec(folder="images")],
        audio=[DataSpec(folder="sounds")],
        point_cloud=[DataSpec(folder="clouds")],
        connector={"objective": "ex-mcr"},
        train=TrainSpec(epochs=2, batch_size=8),
        evaluate=EvaluateSpec(
            audio=DataSpec(folder="test_sounds", label="parent"),
            point_cloud=DataSpec(folder="test_clouds", label="parent"),
            image=DataSpec(folder="test_images", label="parent"),
            names=DataSpec(table="names.csv", column="text", label="concept"),
        ),
    )


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def finished(recipe, data, tmp_path_factory, lines):
    return connect(recipe, tmp_path_factory.mktemp("runs") / "whole", data, report=lines.append)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_pool_has_a_folder_of_its_own_and_what_two_bridges_need_is_made_once(finished, lines):
    folder = finished.folder
    assert sorted(path.relative_to(folder / "pseudo").as_posix() for path in folder.glob("pseudo/*/*")) == [
        *("audio/clap-text", "audio/clip-image", "audio/clip-text"),
        *("image/clap-audio", "image/clap-text", "image/clip-text", "image/ulip-point_cloud"),
        *("point_cloud/clip-image", "point_cloud/clip-text", "point_cloud/ulip-image"),
        *("text/clap-audio", "text/clip-image", "text/ulip-image", "text/ulip-point_cloud"),
    ]
    assert sum(line.startswith("aggregate ") for line in lines) == 14
    assert {space: list(pools) for space, pools in finished.pools.items()} == {
        "clap": ["text", "image", "audio"],
        "ulip": ["image", "text", "point_cloud"],
    }
    for embeds in finished.training_embeds("ulip").values():
        assert list(embeds) == ["clip_image", "ulip_image", "clip_text", "ulip_point_cloud"]


def test_each_bridge_trains_by_itself_and_ends_in_one_model(finished):
    folder = finished.folder
    for space, other in (("clap", "ulip"), ("ulip", "clap")):
        alone = CMCRConnector.from_pretrained(folder / "train" / space / "connector")
        assert alone.config.spaces == ["clip", space]
        assert alone.config.source_config(other) is None
        state = finished.model.connector.projectors[space].state_dict()
        assert equal(alone.projectors[space].state_dict(), state)
    model = CMCRModel.from_pretrained(folder / "model")
    assert model.config.spaces == ["clip", "clap", "ulip"]
    assert equal(model.connector.state_dict(), finished.model.connector.state_dict())
    from_connector = CMCRModel.from_pretrained(folder / "connector")
    assert equal(from_connector.connector.state_dict(), model.connector.state_dict())


def test_the_weights_and_the_embeddings_of_clip_are_as_they_were(finished, tiny_clip):
    source = load_file(tiny_clip / "model.safetensors")
    found = {name.removeprefix("clip."): tensor for name, tensor in weights(finished.folder).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())
    stored = EmbeddingStore.open(finished.folder / "stores" / "clip-image").tensor()
    projected = finished.model.connector.project(stored, "clip", "image")
    assert torch.equal(projected, torch.nn.functional.normalize(stored, dim=-1))


def test_sounds_and_clouds_are_measured_beside_what_is_carried_over_both_banks(finished):
    first = finished.sets[0]
    assert (first.query.modality, first.gallery.modality) == ("audio", "point_cloud")
    ways = ["audio_to_point_cloud", "point_cloud_to_audio", "audio_to_image", "image_to_audio"]
    ways += ["point_cloud_to_image", "image_to_point_cloud", CLASSIFICATION]
    assert list(finished.table["chance"]) == list(finished.table["Ex-MCR"]) == ways
    assert finished.table["Ex-MCR"] == connector_metrics(finished.model.connector, finished.sets)
    # The class names are embedded where there is a text tower, which this ULIP has not.
    assert list(finished.table["closed cascade"]) == ways[:4]
    banks = {
        name: EmbeddingStore.open(finished.folder / "stores" / name).tensor()
        for name in ("clap-text", "clip-text", "clip-image", "ulip-image")
    }
    found = (first.query_bank, *first.between, first.gallery_bank)
    assert all(torch.equal(bank, expected) for bank, expected in zip(found, banks.values(), strict=True))
    assert json.loads((finished.folder / "evaluation.json").read_text())["metrics"] == finished.table


def test_the_page_and_the_card_tell_of_three_spaces(finished):
    page = (finished.folder / "report.html").read_text()
    assert "0</strong> pairs of sound and point cloud in the training" in page
    assert "CLIP with CLAP" in page and "CLIP with ULIP" in page
    assert "Ex-MCR's mAP" in page and "texts and pictures" in page
    card = (finished.folder / "model" / "README.md").read_text()
    assert "| objective | ex-mcr |" in card
    assert "| pools | text, image, audio, point_cloud |" in card
    assert "| method | audio_to_point_cloud mAP | point_cloud_to_audio mAP | audio_to_image mAP |" in card
    assert card.count("| not measured | not measured | not measured |") == 1
    for row in ("texts.csv | the texts that connect | 12", "images | the images that connect | 9"):
        assert row in card
    for row in ("sounds | audio memory | 9", "clouds | point cloud memory | 9"):
        assert row in card
    assert "get_audio_features" in card and "get_point_cloud_features" in card


def test_a_second_run_does_nothing_again(recipe, data, finished, monkeypatch):
    def fails(*given, **options):
        raise AssertionError("This stage is done and should not be entered again.")

    monkeypatch.setattr(aggregate_stores, "aggregate", fails)
    monkeypatch.setattr(walk, "train_connector", fails)
    assert connect(recipe, finished.folder, data).table == finished.table


@pytest.mark.parametrize(("owner", "name", "call"), [(aggregate_stores, "aggregate", 9), (walk, "train_connector", 1)])
def test_a_run_that_is_stopped_ends_with_the_same_weights(
    recipe, data, finished, tmp_path, monkeypatch, owner, name, call
):
    original, calls = getattr(owner, name), []

    def stopping(*given, **options):
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(KeyboardInterrupt):
            connect(recipe, tmp_path / "run", data)
    again = connect(recipe, tmp_path / "run", data)
    assert equal(weights(tmp_path / "run"), weights(finished.folder))
    assert again.table == finished.table


def test_c_mcr_trains_on_pools_of_other_modalities_and_keeps_the_folders_of_the_overlap(
    recipe, data, tmp_path, tiny_clip, tiny_clap
):
    plain = replace(
        recipe,
        sources={"clip": SourceSpec(str(tiny_clip)), "clap": SourceSpec(str(tiny_clap))},
        point_cloud=[],
        connector={"objective": "c-mcr", "projection_dim": 8},
        evaluate=None,
    )
    connect(plain, tmp_path, data)
    before = {path: path.read_bytes() for path in (tmp_path / "pseudo").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"train holds a training run with other stores\.audio/clap-audio"):
        connect(replace(plain, pools=["audio", "text"]), tmp_path, data)
    assert all(path.read_bytes() == content for path, content in before.items())
    done = connect(replace(plain, pools=["audio", "text"]), tmp_path / "pools", data)
    assert {pool: len(embeds["clip_text"]) for pool, embeds in done.training_embeds("clap").items()} == {
        "text": 12,
        "audio": 9,
    }
    assert not (tmp_path / "pools" / "pseudo" / "image").exists()
