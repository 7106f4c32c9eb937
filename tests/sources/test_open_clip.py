"""Sources of open_clip, as far as they go without it; the rest is compared live in tests/parity."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoConfig

from cmcr_hf import CMCRConfig, CMCRModel, CMCRProcessor
from cmcr_hf.conversion.hub import model_card
from cmcr_hf.modeling.foreign_sources_cmcr import foreign_source
from cmcr_hf.sources import open_clip
from cmcr_hf.sources.open_clip import OpenClipConfig, OpenClipModel

MODEL = {"embed_dim": 24, "vision_cfg": {"layers": 2}, "text_cfg": {"width": 64}}
INSTALL = r'pip install "cmcr-hf\[open-clip\]"'


@pytest.fixture
def without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "open_clip" else find(name, *rest)
    )


def test_a_configuration_comes_back_from_its_folder(tmp_path: Path) -> None:
    config = OpenClipConfig(model_cfg=MODEL, preprocess_cfg={"size": 32}, projection_dim=24, context_length=9)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, OpenClipConfig)
    assert (again.model_cfg, again.preprocess_cfg, again.projection_dim) == (MODEL, {"size": 32}, 24)
    assert (again.context_length, again.pad_token_id, again.hf_text_config) == (9, 0, None)


def test_a_model_takes_one_as_its_clip(tmp_path: Path) -> None:
    config = CMCRConfig(clip_config=OpenClipConfig(model_cfg=MODEL, projection_dim=24), projection_dim=8)
    config.save_pretrained(tmp_path)
    again = CMCRConfig.from_pretrained(tmp_path)
    assert again.clip_config.model_cfg == MODEL
    assert again.projectors["clip"]["input_dim"] == 24
    assert again.modalities_of("clip") == ("image", "text")


@pytest.mark.parametrize("fields", [{"projection_dim": 0}, {"context_length": 0}, {"model_cfg": MODEL}])
def test_fields_that_do_not_agree_are_refused(fields: dict) -> None:
    with pytest.raises(Exception, match=r"at least 1|embed_dim of model_cfg, 24, got 512"):
        OpenClipConfig(**fields)


def test_only_the_names_of_open_clip_lead_here() -> None:
    assert foreign_source("open_clip:ViT-B-32/openai") is open_clip
    for name in ("openai/clip-vit-base-patch32", Path("open_clip"), "open_clip/ViT-B-32"):
        assert foreign_source(name) is None


@pytest.mark.usefixtures("without_open_clip")
def test_without_open_clip_a_source_names_the_command_that_installs_it(tiny_clap: Path) -> None:
    with pytest.raises(ImportError, match=INSTALL):
        CMCRModel.from_sources_pretrained("open_clip:ViT-B-32/openai", tiny_clap)
    with pytest.raises(ImportError, match=INSTALL):
        CMCRProcessor.from_sources_pretrained("open_clip:ViT-B-32/openai", tiny_clap)


@pytest.mark.usefixtures("without_open_clip")
def test_without_open_clip_a_saved_model_names_the_command_that_installs_it(tmp_path: Path) -> None:
    OpenClipConfig(model_cfg=MODEL, projection_dim=24).save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=INSTALL):
        OpenClipModel(AutoConfig.from_pretrained(tmp_path))


def test_the_card_does_not_take_a_name_of_open_clip_for_one_on_the_hub() -> None:
    sources = {"clip": {"id": "open_clip:ViT-B-32/openai"}, "clap": {"id": "laion/clap-htsat-fused"}}
    card = model_card(CMCRConfig(sources=sources), repo_id="mine", licences={})
    assert card.data.base_model == ["laion/clap-htsat-fused"]
    assert "open_clip:ViT-B-32/openai" in str(card)
