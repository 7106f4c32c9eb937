"""A connector knows its sources by what they give."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging

from cmcr_hf import CMCRConfig, CMCRConnector, CMCRModel, CMCRProcessor
from cmcr_hf.modeling.sources_cmcr import FINGERPRINT_ROWS, fingerprint


@pytest.fixture(scope="module")
def processor(tiny_clip, tiny_clap):
    return CMCRProcessor.from_sources_pretrained(tiny_clip, tiny_clap)


@pytest.fixture(scope="module")
def connector_folder(tiny_clip, tiny_clap, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fingerprinted") / "connector"
    model = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, config={"projection_dim": 8})
    model.record_fingerprints(processor)
    model.connector.save_pretrained(folder)
    return folder


def copy_of(source: Path, folder: Path, name: str, change) -> Path:
    """Copy a source with one of its weights changed."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_fingerprint_of_a_modality_has_a_unit_row_for_each_fixed_input(tiny_clip, processor):
    source = AutoModel.from_pretrained(tiny_clip)
    for modality in ("text", "image"):
        found = fingerprint(source, processor, "clip", modality)
        assert found.shape == (FINGERPRINT_ROWS[modality], 24)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(found)))


def test_a_fingerprint_is_bit_equal_at_each_call(tiny_clap, processor):
    source = AutoModel.from_pretrained(tiny_clap)
    assert torch.equal(*(fingerprint(source, processor, "clap", "audio") for _ in range(2)))


def test_taking_a_fingerprint_keeps_the_mode_of_the_source(tiny_clap, processor):
    source = AutoModel.from_pretrained(tiny_clap).train()
    fingerprint(source, processor, "clap", "text")
    assert source.training


def test_the_connector_checkpoint_carries_the_fingerprints_of_every_modality(connector_folder):
    assert CMCRConfig.from_pretrained(connector_folder).fingerprints == [
        "clip_image",
        "clip_text",
        "clap_audio",
        "clap_text",
    ]
    recorded = CMCRConnector.from_pretrained(connector_folder).fingerprint_clap_text
    assert recorded.shape == (FINGERPRINT_ROWS["text"], 16) and recorded.norm(dim=-1).min() > 0.99


def test_the_sources_of_a_connector_attach(connector_folder, tiny_clip, tiny_clap, caplog):
    model = CMCRModel.from_pretrained(connector_folder)
    assert model.config.fingerprints
    again = CMCRModel.from_sources_pretrained(tiny_clip, tiny_clap, connector_folder)
    torch.testing.assert_close(again.connector.state_dict(), model.connector.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sources_of_a_connector_attach_in_half_precision(connector_folder, dtype):
    assert CMCRModel.from_pretrained(connector_folder, dtype=dtype).dtype == dtype


@pytest.mark.parametrize(
    ("space", "weight", "modality"),
    [
        ("clip", "visual_projection.weight", "image"),
        ("clip", "text_projection.weight", "text"),
        ("clap", "audio_projection.linear2.weight", "audio"),
        ("clap", "text_projection.linear2.weight", "text"),
    ],
)
def test_other_weights_of_any_tower_are_refused_with_the_space_and_the_cosine(
    connector_folder, tiny_clip, tiny_clap, tmp_path, space, weight, modality
):
    sources = {"clip": tiny_clip, "clap": tiny_clap}
    sources[space] = copy_of(sources[space], tmp_path / "other", weight, lambda tensor: tensor.flip(0))
    expected = rf"other' is not the {space} source .* its {modality} emb.* cosine of -?0\.\d"
    with pytest.raises(ValueError, match=expected):
        CMCRModel.from_sources_pretrained(**sources, connector=connector_folder)


@pytest.mark.parametrize("size", [0.02, 1.0])
def test_weights_that_were_trained_on_are_refused(connector_folder, tiny_clip, tiny_clap, tmp_path, size):
    def change(tensor):
        return tensor + size * tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))

    other = copy_of(tiny_clip, tmp_path / "other", "visual_projection.weight", change)
    with pytest.raises(ValueError, match="not the clip source"):
        CMCRModel.from_sources_pretrained(other, tiny_clap, connector_folder)


def test_another_tokenizer_is_refused(connector_folder, tiny_clip, tiny_clap, tmp_path):
    other = copy_of(tiny_clip, tmp_path / "other", "logit_scale", lambda tensor: tensor)
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"dog": 6', '"dog": 7').replace('"cat": 7', '"cat": 6'))
    assert (other / "tokenizer.json").read_text() != tokenizer
    with pytest.raises(ValueError, match="not the clip source"):
        CMCRModel.from_sources_pretrained(other, tiny_clap, connector_folder)


def test_a_source_whose_embeddings_are_not_finite_is_refused(connector_folder, tiny_clip, tiny_clap, tmp_path):
    other = copy_of(tiny_clip, tmp_path / "other", "text_projection.weight", lambda tensor: tensor * float("nan"))
    with pytest.raises(ValueError, match="cosine of nan"):
        CMCRModel.from_sources_pretrained(other, tiny_clap, connector_folder)


def test_loaded_models_are_checked_with_a_processor(connector_folder, tiny_clip, tiny_clap, processor):
    clip, clap = AutoModel.from_pretrained(tiny_clip), AutoModel.from_pretrained(tiny_clap)
    CMCRModel.from_sources_pretrained(clip, clap, connector_folder, processor=processor)
    with torch.no_grad():
        clap.audio_projection.linear2.weight.copy_(clap.audio_projection.linear2.weight.flip(0))
    with pytest.raises(ValueError, match="The model given is not the clap source"):
        CMCRModel.from_sources_pretrained(clip, clap, connector_folder, processor=processor)


def test_loaded_models_without_a_processor_are_attached_with_a_warning(
    connector_folder, tiny_clip, tiny_clap, monkeypatch
):
    warnings = []
    monkeypatch.setattr(logging.get_logger("cmcr_hf.modeling.modeling_cmcr"), "warning", warnings.append)
    clip = AutoModel.from_pretrained(tiny_clip)
    CMCRModel.from_sources_pretrained(clip, tiny_clap, connector_folder)
    assert "is not checked" in warnings[0]


def test_a_full_checkpoint_keeps_the_fingerprints_of_its_connector(connector_folder, tmp_path):
    model = CMCRModel.from_pretrained(connector_folder)
    model.save_pretrained(tmp_path)
    loaded = CMCRModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.connector.fingerprint_clip_text, model.connector.fingerprint_clip_text)


def test_a_fingerprint_of_an_unknown_space_is_refused():
    with pytest.raises(Exception, match="space_modality"):
        CMCRConfig(fingerprints=["ulip_text"])
