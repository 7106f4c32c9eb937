"""LAION-CLAP files as sources, converted while they are read. The file is small and random, of the released layout."""

import shutil

import numpy as np
import pytest
import torch
from transformers import ClapModel

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.conversion import convert_laion_clap
from cmcr_hf.sources import laion_clap


@pytest.fixture(scope="module", params=["fused", "unfused"])
def source(request, shared, tiny_clap, tmp_path_factory):
    """A file of the released form beside a tokenizer."""
    folder = tmp_path_factory.mktemp("laion")
    path = folder / "laion.pt"
    shutil.copy(shared / f"official/golden/laion_clap_small_{request.param}.pt", path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_clap / name, folder)
    return path


@pytest.fixture
def four_heads(monkeypatch):
    """Read the text tower with the 4 heads that the small file was made with, where released ones have 12."""
    read, config = convert_laion_clap.read_clap, convert_laion_clap.clap_config
    monkeypatch.setattr(laion_clap, "read_clap", lambda path: read(path, text_heads=4))
    monkeypatch.setattr(laion_clap, "clap_config", lambda weights: config(weights, text_heads=4))


def test_a_file_is_a_source_like_any_other(source, four_heads, tiny_clip, tmp_path):
    model = CMCRModel.from_sources_pretrained(tiny_clip, source, config={"projection_dim": 8})
    processor = CMCRProcessor.from_sources_pretrained(tiny_clip, source)
    assert model.config.sources["clap"] == {"id": str(source), "revision": None}
    clip = np.random.default_rng(0).normal(0, 0.1, 30_000).astype(np.float32)
    inputs = processor(audio=clip, sampling_rate=48_000)
    expected, _ = convert_laion_clap.read_clap(source, text_heads=4)
    embeds = expected.get_audio_features(**inputs).pooler_output
    assert torch.equal(model.get_audio_features(**inputs).pooler_output, model.connector.project(embeds, "clap"))
    # Saved whole, it needs neither the file nor this package.
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, inputs_again = CMCRModel.from_pretrained(tmp_path), CMCRProcessor.from_pretrained(tmp_path)
    assert type(again.clap) is ClapModel
    found = again.get_audio_features(**inputs_again(audio=clip, sampling_rate=48_000)).pooler_output
    torch.testing.assert_close(found, model.get_audio_features(**inputs).pooler_output, rtol=0, atol=1e-6)


def test_a_connector_finds_its_file_again_and_knows_another_one(source, four_heads, tiny_clip, tmp_path):
    torch.manual_seed(0)
    model = CMCRModel.from_sources_pretrained(tiny_clip, source, config={"projection_dim": 8})
    model.record_fingerprints(CMCRProcessor.from_sources_pretrained(tiny_clip, source))
    model.connector.save_pretrained(tmp_path)
    assert CMCRModel.from_pretrained(tmp_path).config.sources["clap"]["id"] == str(source)
    content = torch.load(source, weights_only=True)
    weight = content["state_dict"]["module.audio_projection.2.weight"]
    weight.copy_(weight.flip(0))
    other = tmp_path / "other.pt"
    for path in (source.parent / "tokenizer.json", source.parent / "tokenizer_config.json"):
        shutil.copy(path, tmp_path)
    torch.save(content, other)
    with pytest.raises(ValueError, match=r"other\.pt' is not the clap source .*its audio embeddings"):
        CMCRModel.from_sources_pretrained(tiny_clip, other, tmp_path)


def test_towers_that_are_not_asked_for_are_left_out(source, four_heads):
    model = laion_clap.load_model(source, ["audio"], {"dtype": torch.bfloat16})
    assert {name for name, _ in model.named_children()} == {"audio_model", "audio_projection"}
    assert model.dtype == torch.bfloat16 and not model.training


def test_a_missing_file_is_named(tiny_clip, tmp_path):
    with pytest.raises(ValueError, match=r"Cannot read .*none\.pt: there is no such file"):
        CMCRModel.from_sources_pretrained(tiny_clip, tmp_path / "none.pt")
