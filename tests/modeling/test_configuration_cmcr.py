import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ClapConfig, CLIPConfig, SiglipConfig

from cmcr_hf import CMCRConfig

SIGLIP_TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 9,
}


def two_projectors(**fields):
    return CMCRConfig(projectors={"clip": {"input_dim": 4}, "clap": {"input_dim": 6}}, **fields)


def test_projectors_take_their_width_from_the_sources():
    config = CMCRConfig(
        clip_config=SiglipConfig(text_config={**SIGLIP_TEXT, "bos_token_id": 1, "eos_token_id": 2}),
        clap_config=ClapConfig(projection_dim=96),
        projection_dim=64,
    )
    assert {space: projector["input_dim"] for space, projector in config.projectors.items()} == {
        "clip": 24,
        "clap": 96,
    }
    assert config.projectors["clip"]["hidden_dim"] == 128
    assert config.bridges == [["clip", "clap", "text"]]


def test_official_sizes_are_the_default_ones():
    projector = CMCRConfig(clip_config=CLIPConfig(), clap_config=ClapConfig()).projectors["clap"]
    assert projector == {"layout": "linear-bn-relu-linear-bn", "input_dim": 512, "hidden_dim": 1024}


def test_an_objective_brings_the_values_of_its_paper_where_none_are_given(tmp_path):
    assert (two_projectors().overlap_temperature, two_projectors().leaf_temperature) == (0.01, 0.01)
    assert two_projectors().projection_dim == 512
    config = two_projectors(objective="ex-mcr", leaf_temperature=0.2)
    assert (config.overlap_temperature, config.leaf_temperature, config.projection_dim) == (0.05, 0.2, 4)
    assert config.projectors == {
        "clip": {"layout": "identity", "input_dim": 4},
        "clap": {"layout": "ex-mcr", "input_dim": 6, "hidden_dim": 8},
    }
    for saved in (config, two_projectors()):
        # Written out, so that another default of a later version changes no model.
        saved.save_pretrained(tmp_path)
        document = json.loads((tmp_path / "config.json").read_text())
        assert document["overlap_temperature"] == saved.overlap_temperature
        assert document["projection_dim"] == saved.projection_dim


def test_default_noise_is_the_variance_of_the_paper_at_512_dimensions():
    assert CMCRConfig().noise_norm ** 2 / 512 == pytest.approx(0.004, rel=1e-6)


def test_every_field_survives_saving_and_loading(tmp_path):
    config = CMCRConfig(
        clip_config=CLIPConfig(projection_dim=32),
        clap_config=ClapConfig(projection_dim=16),
        projection_dim=16,
        projectors={"clap": {"layout": "identity"}},
        sources={"clip": {"id": "org/clip", "revision": "abc"}},
        objective="bridge-distillation",
        overlap_temperature=0.2,
        noise_norm=0,
        intra_squared=True,
        default_spaces={"text": "clap"},
        freeze_sources=False,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is CMCRConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.projectors["clap"] == {"layout": "identity", "input_dim": 16}
    assert type(loaded.clap_config) is ClapConfig


def test_text_goes_through_clip_unless_another_space_is_named():
    config = two_projectors()
    assert config.space_of("text") == "clip"
    assert config.space_of("text", "clap") == "clap"
    assert config.space_of("audio") == "clap"


def test_a_space_without_the_modality_is_refused():
    with pytest.raises(ValueError, match=r"a space that embeds audio, one of \['clap'\], got 'clip'"):
        two_projectors().space_of("audio", "clip")


def test_the_ulip_space_of_a_connector_needs_no_source_configuration():
    config = CMCRConfig(projectors={"clip": {"input_dim": 4}, "ulip": {"input_dim": 4, "layout": "linear-bn-relu"}})
    assert config.bridges == [["clip", "ulip", "image"]]
    assert config.space_of("point_cloud") == "ulip"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projectors": {"sound": {"input_dim": 4}}}, "Unknown space 'sound'"),
        ({"projectors": {"clip": {"input_dim": 4, "layout": "mlp"}}}, "Unknown layout 'mlp'"),
        ({"projectors": {"clip": {"input_dim": 4, "depth": 3}}}, "Unknown fields"),
        ({"projectors": {"clip": {"input_dim": 4, "layout": "identity"}}}, "projection_dim must equal"),
        (
            {"objective": "ex-mcr", "projectors": {"clip": {"layout": "linear-bn-relu"}, "clap": {}}},
            "Expected the layout 'identity' of the clip projector",
        ),
        ({"bridges": [["clip", "clap"]]}, "Expected a bridge"),
        ({"bridges": [["clip", "clap", "image"]]}, "Expected a bridge"),
        ({"bridges": [["clip", "ulip", "image"]]}, "without a projector"),
        ({"default_spaces": {"audio": "clip"}}, "default space of audio"),
        ({"leaf_temperature": 0.0}, "leaf_temperature must be positive"),
        ({"noise_norm": -1.0}, "noise_norm must not be negative"),
        ({"noise_norm": float("nan")}, "noise_norm must not be negative, and finite"),
        ({"leaf_temperature": float("inf")}, "leaf_temperature must be positive and finite"),
        ({"projection_dim": 0}, "projection_dim must be a whole number"),
        ({"projection_dim": 10**9}, "projection_dim must be a whole number"),
        ({"projectors": {"clip": {"input_dim": 4, "hidden_dim": 0}}}, "hidden_dim of the clip projector must be"),
        ({"projectors": {"clip": "identity"}}, "Expected the clip projector as"),
        ({"overlap_temperature": "cold"}, "overlap_temperature"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        CMCRConfig(**fields)


def test_an_unknown_kind_of_source_must_state_its_width():
    vit = AutoConfig.for_model("vit")
    with pytest.raises(ValueError, match="Cannot tell the embedding width of a ViTConfig"):
        CMCRConfig(clip_config=vit, clap_config=ClapConfig())
    stated = CMCRConfig(clip_config=vit, clap_config=ClapConfig(), projectors={"clip": {"input_dim": 7}})
    assert stated.projectors["clip"]["input_dim"] == 7


def test_bridge_distillation_has_noise_and_a_temperature_of_its_own():
    config = CMCRConfig(objective="bridge-distillation")
    assert (config.noise_norm, config.leaf_temperature, config.mix_items) == (0.35, 0.2, True)
    assert (config.target_power, config.target_lift) == (3, 1)
    assert CMCRConfig().noise_norm == pytest.approx(1.4310835)
    assert CMCRConfig(objective="bridge-distillation", noise_norm=0.5).noise_norm == 0.5
    layout = {"layout": "linear-bn-relu-linear-bn", "input_dim": 512, "hidden_dim": 1024}
    assert config.projectors == {"clip": layout, "clap": layout}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"posterior_temperatures": {"ulip": 0.1}}, "posterior_temperatures as {space: number}"),
        ({"posterior_temperatures": {"clip": 0}}, "posterior_temperatures.clip must be positive"),
        ({"posterior_temperatures": {"clip": 0.1}}, "posterior_temperatures lack clap, expected those of both spaces"),
        ({"posterior_temperatures": {}}, "posterior_temperatures lack clip and clap"),
        ({"target_power": 0}, "target_power must be positive"),
        ({"target_lift": -0.1}, "target_lift must be from 0 to 1"),
        ({"target_lift": 1.1}, "target_lift must be from 0 to 1"),
        ({"target_lift": float("nan")}, "target_lift must be from 0 to 1"),
        ({"posterior_top": 0}, "posterior_top must be a whole number"),
    ],
)
def test_settings_of_the_distillation_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(StrictDataclassError) as caught:
        CMCRConfig(objective="bridge-distillation", **fields)
    assert message in str(caught.value.__cause__ or caught.value)
