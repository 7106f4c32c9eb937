from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmcr_hf.evaluation.embedding import EvaluatedModel, load_model
from cmcr_hf.training.data import Items

SENTENCES = ["a dog barks", "the small bell rings", "a cat"]


@pytest.fixture
def texts() -> Items:
    return Items.listed("text", SENTENCES)


def open_model(name: Path, folder: Path, *modalities: str) -> EvaluatedModel:
    return EvaluatedModel(str(name), folder, modalities=modalities or ("text",), progress=False)


def stores(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "stores").iterdir())


def changed(model: Path, folder: Path, prefix: str) -> Path:
    """A copy of a model, of whose weights one with this prefix differs."""
    copy = Path(shutil.copytree(model, folder))
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.startswith(prefix) and weights[name].is_floating_point())
    weights[name] = weights[name] + 0.25
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("space", ["clip", "clap"])
def test_what_is_projected_from_the_store_is_what_the_model_embeds(
    tiny_model: Path, texts: Items, tmp_path: Path, space: str
) -> None:
    found = open_model(tiny_model, tmp_path).embeds(texts, space)
    model, processor = load_model(str(tiny_model))
    with torch.inference_mode():
        expected = model.get_text_features(**processor(text=SENTENCES, space=space), space=space).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_another_connector_on_the_same_towers_uses_the_store_that_is_there(
    tiny_model: Path, texts: Items, tmp_path: Path
) -> None:
    first = open_model(tiny_model, tmp_path / "out")
    second = open_model(changed(tiny_model, tmp_path / "copy", "connector.projectors.clip"), tmp_path / "out")
    assert torch.equal(first.source_embeds(texts), second.source_embeds(texts))
    assert not torch.equal(first.embeds(texts), second.embeds(texts))
    assert len(stores(tmp_path / "out")) == 1
    assert first.record()["connector_sha256"] != second.record()["connector_sha256"]
    assert first.record()["towers_sha256"] == second.record()["towers_sha256"]


def test_another_tower_of_the_same_name_makes_a_store_beside_it(
    tiny_model: Path, texts: Items, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere" / tiny_model.name
    changed(tiny_model, copy, "clip.text_model")
    first, second = open_model(tiny_model, tmp_path / "out"), open_model(copy, tmp_path / "out")
    assert not torch.equal(first.source_embeds(texts), second.source_embeds(texts))
    assert len(stores(tmp_path / "out")) == 2


def test_other_texts_make_a_store_beside_it(tiny_model: Path, texts: Items, tmp_path: Path) -> None:
    model = open_model(tiny_model, tmp_path)
    assert len(model.embeds(texts)) == 3
    assert len(model.embeds(Items.listed("text", SENTENCES[:2]))) == 2
    assert len(stores(tmp_path)) == 2


def test_the_towers_that_are_loaded_beside_it_do_not_matter_to_a_store(
    tiny_model: Path, texts: Items, tmp_path: Path
) -> None:
    open_model(tiny_model, tmp_path, "text").embeds(texts)
    open_model(tiny_model, tmp_path, "text", "image", "audio").embeds(texts)
    assert len(stores(tmp_path)) == 1


def test_a_modality_that_the_model_lacks_is_named_before_it_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected text and point_cloud"):
        open_model(tiny_model, tmp_path, "text", "point_cloud")
