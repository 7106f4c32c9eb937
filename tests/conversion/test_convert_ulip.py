"""ULIP's container as a `UlipModel`, against arrays that the official code made."""

import argparse
import json

import numpy as np
import pytest
import torch

from cmcr_hf import UlipModel
from cmcr_hf.conversion.convert_ulip import (
    convert_state_dict,
    image_processor,
    plain_images,
    prove_ulip,
    read_ulip,
    ulip_config,
)
from cmcr_hf.conversion.plain import clip_text, quick_gelu

# What the small model of the golden files has otherwise than the released ones.
SMALL = {
    "point_config": {"num_groups": 16, "group_size": 8, "num_attention_heads": 4},
    "vision_config": {"num_attention_heads": 4},
    "text_config": {"num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def official(shared):
    return read_ulip(shared / "official/golden/ulip_small.pt", SMALL)


def test_the_proof_of_the_golden_container_is_within_its_bound(official):
    proof = prove_ulip(*official)
    assert proof.reference == "a plain reading of the original layout"
    assert set(proof.differences) == {"point cloud", "image", "text"}
    assert max(proof.differences.values()) < 1e-6


def test_the_plain_reading_gives_the_golden_values(official, shared):
    model, checkpoint = official
    with np.load(shared / "official/golden/ulip_small_io.npz", allow_pickle=False) as golden:
        image, text = torch.from_numpy(golden["image"]), torch.from_numpy(golden["text"])
        found = plain_images(image, checkpoint.weights, model.config)
        torch.testing.assert_close(found, torch.from_numpy(golden["image_embed"]), rtol=0, atol=1e-5)
        found = clip_text(text, checkpoint.weights, 4, quick_gelu)
        torch.testing.assert_close(found, torch.from_numpy(golden["text_embed"]), rtol=0, atol=1e-5)


def test_one_altered_weight_breaks_the_proof(official):
    model, checkpoint = official
    with torch.no_grad():
        model.point_model.layers[1].fc2.weight[3, 5] += 0.1
        try:
            with pytest.raises(ValueError, match="its point cloud embeddings differ by"):
                prove_ulip(model, checkpoint)
        finally:
            model.point_model.layers[1].fc2.weight[3, 5] -= 0.1


def test_the_released_size_is_read_from_the_shapes(shared):
    table = json.loads((shared / "official/golden/tables/ulip_pointbert_full.json").read_text())["keys"]
    state = {
        key.removeprefix("module."): torch.zeros(1, dtype=getattr(torch, dtype)).expand(shape or [1]).view(shape)
        for key, (shape, dtype) in table.items()
    }
    config = ulip_config(state)
    with torch.device("meta"):
        expected = UlipModel(config).state_dict()
    converted = convert_state_dict(state)
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    point = config.point_config
    assert (point.num_groups, point.group_size, point.hidden_size, point.num_attention_heads) == (512, 32, 384, 6)
    assert (config.vision_config.image_size, config.vision_config.num_attention_heads) == (224, 12)
    assert (config.text_config.eos_token_id, config.text_config.num_attention_heads) == (49407, 8)


def container(shared, **changes):
    weights = read_ulip(shared / "official/golden/ulip_small.pt", SMALL)[1].weights
    state = {f"module.{key}": value for key, value in {**weights, **changes}.items() if value is not None}
    return {"epoch": 1, "state_dict": state, "args": argparse.Namespace(model="ULIP_PointBERT")}


def test_a_file_of_the_point_encoder_alone_makes_a_model_without_the_other_towers(shared, tmp_path, official):
    content = container(shared)
    content["state_dict"] = {
        key: value
        for key, value in content["state_dict"].items()
        if key.startswith(("module.point_encoder.", "module.pc_projection", "module.logit_scale"))
    }
    torch.save(content, tmp_path / "pointbert.pt")
    model, checkpoint = read_ulip(tmp_path / "pointbert.pt", SMALL)
    assert (model.config.vision_config, model.config.text_config) == (None, None)
    assert set(prove_ulip(model, checkpoint).differences) == {"point cloud"}
    clouds = torch.randn(1, 64, 3, generator=torch.Generator().manual_seed(0))
    expected = official[0].get_point_cloud_features(clouds).pooler_output
    assert torch.equal(model.get_point_cloud_features(clouds).pooler_output, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"open_clip_model.logit_scale": torch.zeros(1)}, r"Unknown key 'open_clip_model\.logit_scale'"),
        ({"pc_projection": None}, "Missing key 'pc_projection'"),
        ({"visual.norm.bias": None}, r"lacks weights, such as those that become 'vision_model\.layernorm\.bias'"),
        ({"point_encoder.norm.weight": torch.zeros(5)}, r"Misshapen .*'point_model\.layer_norm\.weight'"),
        ({"visual.blocks.0.attn.qkv.weight": torch.zeros(5, 48)}, r"Misshapen key 'visual\.blocks\.0\.attn\.qkv"),
    ],
)
def test_other_weights_are_refused_by_the_name_of_the_key(shared, tmp_path, changes, reason):
    torch.save(container(shared, **changes), tmp_path / "ulip.pt")
    with pytest.raises(ValueError, match=rf"Cannot convert .*ulip\.pt: .*{reason}"):
        read_ulip(tmp_path / "ulip.pt", SMALL)


def test_images_are_prepared_with_the_statistics_of_imagenet(official):
    processor = image_processor(official[0])
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    grey = np.full((40, 60, 3), 128, np.uint8)
    pixels = processor(grey, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    expected = (128 / 255 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[0, :, 0, 0], expected, rtol=1e-5)
