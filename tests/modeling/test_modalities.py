import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPModel, Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.modeling import towers_cmcr

IDS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
TOWERS = {
    "image": {"clip.vision_model", "clip.visual_projection"},
    "text": {"clip.text_model", "clip.text_projection", "clap.text_model", "clap.text_projection"},
    "audio": {"clap.audio_model", "clap.audio_projection"},
}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_features": torch.randn(2, 1, 126, 16, generator=generator),
    }


@pytest.fixture(scope="module")
def connector_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "connector"
    model = CMCRModel.from_pretrained(tiny_model)
    model.record_fingerprints(CMCRProcessor.from_pretrained(tiny_model))
    model.connector.save_pretrained(folder)
    return folder


@pytest.fixture(params=["full", "connector"])
def folder(request, tiny_model, connector_folder):
    return {"full": tiny_model, "connector": connector_folder}[request.param]


def towers(model):
    return {f"{space}.{name}" for space, source in model.sources.items() for name, _ in source.named_children()}


@pytest.mark.parametrize("modalities", [("audio", "image"), ("text",), ("audio",), ("image", "text")])
def test_only_the_towers_asked_for_are_built(folder, modalities):
    model = CMCRModel.from_pretrained(folder, modalities=modalities)
    assert towers(model) == set().union(*(TOWERS[modality] for modality in modalities))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert set(model.connector.projectors) == {"clip", "clap"}


def test_without_modalities_every_tower_is_built(folder):
    assert towers(CMCRModel.from_pretrained(folder)) == set().union(*TOWERS.values())


def test_a_partial_model_gives_the_embeddings_of_the_whole(folder, tiny_model, inputs):
    expected = CMCRModel.from_pretrained(tiny_model)(**inputs)
    output = CMCRModel.from_pretrained(folder, modalities=("audio", "image"))(**inputs)
    assert torch.equal(output.image_embeds, expected.image_embeds)
    assert torch.equal(output.audio_embeds, expected.audio_embeds)
    assert torch.equal(output.logits_per_audio_image, expected.logits_per_audio_image)


def test_text_means_the_text_towers_of_all_sources(folder, tiny_model):
    whole, model = CMCRModel.from_pretrained(tiny_model), CMCRModel.from_pretrained(folder, modalities=["text"])
    for space in ("clip", "clap"):
        expected = whole.get_text_features(IDS, space=space).pooler_output
        assert torch.equal(model.get_text_features(IDS, space=space).pooler_output, expected)


def test_using_a_tower_that_was_not_loaded_says_how_to_load_it(folder, inputs):
    model = CMCRModel.from_pretrained(folder, modalities=["audio"])
    message = r"modalities=\['audio'\], without the {} tower of clip. Load it with '{}' among its modalities"
    with pytest.raises(ValueError, match=message.format("text", "text")):
        model.get_text_features(IDS)
    with pytest.raises(ValueError, match=message.format("image", "image")):
        model(**inputs)


def test_a_partial_model_is_not_saved_without_its_other_towers(folder, tmp_path):
    model = CMCRModel.from_pretrained(folder, modalities=("audio", "image"))
    with pytest.raises(ValueError, match="would lack its clip text, clap text towers"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.connector.save_pretrained(tmp_path / "connector")
    loaded = CMCRModel.from_pretrained(tmp_path / "connector")
    assert towers(loaded) == set().union(*TOWERS.values())


def test_the_connector_of_a_partial_model_still_records_every_source(connector_folder, tmp_path):
    model = CMCRModel.from_pretrained(connector_folder, modalities=["image"])
    model.connector.save_pretrained(tmp_path)
    assert (
        CMCRModel.from_pretrained(tmp_path).config.sources
        == CMCRModel.from_pretrained(connector_folder).config.sources
    )


@pytest.mark.parametrize("modalities", [("sound",), ("audio", "point_cloud"), (), "audio", 5])
def test_unknown_modalities_are_an_error(folder, modalities):
    with pytest.raises(
        ValueError, match=r"Expected modalities as a list of some of \['image', 'text', 'audio'\], got"
    ):
        CMCRModel.from_pretrained(folder, modalities=modalities)


def test_auto_model_passes_the_modalities_on(folder):
    assert towers(AutoModel.from_pretrained(folder, modalities=["image"])) == TOWERS["image"]


def test_the_weights_of_other_towers_are_not_read(folder, monkeypatch):
    read = []

    class Recorded:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_slice(self, key):
            return RecordedSlice(key, self.file.get_slice(key))

    class RecordedSlice:
        def __init__(self, key, part):
            self.key, self.part = key, part

        def __getattr__(self, name):
            return getattr(self.part, name)

        def __getitem__(self, index):
            read.append(self.key)
            return self.part[index]

    monkeypatch.setattr("transformers.modeling_utils.safe_open", Recorded)
    CMCRModel.from_pretrained(folder, modalities=["audio"])
    assert any("audio_model." in key for key in read)
    assert not [key for key in read if "text_model." in key or "vision_model." in key]


def test_missing_weights_of_a_tower_asked_for_are_an_error(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("clip.vision_model.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .* of the weights of a CMCRModel, e.g. 'clip.vision_model"):
        CMCRModel.from_pretrained(folder, modalities=["image"])
    assert towers(CMCRModel.from_pretrained(folder, modalities=["audio"])) == TOWERS["audio"]


def test_a_source_that_no_modality_needs_need_not_be_there(connector_folder, tmp_path, inputs, tiny_model):
    folder = tmp_path / "moved"
    shutil.copytree(connector_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sources"]["clap"]["id"], config["fingerprints"] = "org/absent", None
    (folder / "config.json").write_text(json.dumps(config))
    model = CMCRModel.from_pretrained(folder, modalities=["image"])
    expected = CMCRModel.from_pretrained(tiny_model).get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output, expected)


def test_the_fingerprint_of_a_loaded_tower_is_checked(connector_folder, tmp_path):
    folder = tmp_path / "connector"
    shutil.copytree(connector_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["fingerprint_clap_audio"] = -weights["fingerprint_clap_audio"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not the clap source that the connector was trained on: its audio"):
        CMCRModel.from_pretrained(folder, modalities=["audio"])
    assert towers(CMCRModel.from_pretrained(folder, modalities=["image"])) == TOWERS["image"]


def test_a_loaded_model_given_as_a_source_stays_whole(tiny_clip, tiny_clap, inputs):
    clip = CLIPModel.from_pretrained(tiny_clip)
    model = CMCRModel.from_sources_pretrained(clip, tiny_clap, modalities=("audio", "image"))
    assert model.clip is clip and hasattr(clip, "text_model")
    assert not hasattr(model.clap, "text_model")
    with pytest.raises(ValueError, match="without the text tower of clip"):
        model.get_text_features(IDS)


@pytest.mark.parametrize(("config_class", "model_class"), [(SiglipConfig, SiglipModel), (Siglip2Config, Siglip2Model)])
def test_siglip_sources_are_loaded_in_part(config_class, model_class, tiny_clap, tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = {**small, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**small, "patch_size": 4, **({"num_patches": 16} if model_class is Siglip2Model else {"image_size": 16})}
    torch.manual_seed(0)
    whole = model_class(config_class(text_config=text, vision_config=vision))
    whole.save_pretrained(tmp_path)
    model = CMCRModel.from_sources_pretrained(tmp_path, tiny_clap, modalities=["image"])
    assert type(model.clip) is model_class
    assert towers(model) == {"clip.vision_model"}
    for name, parameter in model.clip.vision_model.state_dict().items():
        assert torch.equal(parameter, whole.vision_model.state_dict()[name])


def test_a_partial_model_in_training_keeps_its_sources_frozen(tiny_model):
    model = CMCRModel.from_pretrained(tiny_model, modalities=("audio", "image")).train()
    assert model.connector.training
    assert not any(parameter.requires_grad for source in model.sources.values() for parameter in source.parameters())


def test_a_partial_load_warns_of_no_weights_that_it_leaves_out(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    CMCRModel.from_pretrained(folder, modalities=["audio"])
    assert not caplog.records


def test_every_tower_of_clip_and_clap_has_a_known_name(tiny_model):
    model = CMCRModel.from_pretrained(tiny_model)
    known = tuple(prefix for prefixes in towers_cmcr.TOWER_PREFIXES.values() for prefix in prefixes)
    for source in model.sources.values():
        assert all(name.startswith(known) for name, _ in source.named_children())
        rest = np.sum([parameter.numel() for parameter in source.parameters(recurse=False)])
        assert rest <= 2
