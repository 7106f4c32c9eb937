from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, SiglipConfig, SiglipModel

from cmcr_hf.evaluation.dense_maps import PatchEncoder, patch_embeds
from tests.conftest import CLIP_TEXT, CLIP_VISION


def siglip(patch_size: int) -> SiglipModel:
    torch.manual_seed(0)
    text = {**CLIP_TEXT, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**CLIP_VISION, "patch_size": patch_size}))
    # Biases start as zeros.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.inference_mode()
def test_patches_of_clip_are_their_own_values_in_the_last_attention(tiny_clip: Path) -> None:
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    encoder = PatchEncoder(model)
    rows = encoder.get_image_features(pixels).pooler_output
    assert (rows.shape, encoder.side, encoder.dim) == ((3, 4 * 24), 2, 96)
    # With weights of the attention that are those of the identity, from what the model itself has seen there.
    states = model.vision_model(pixels, output_hidden_states=True).hidden_states
    layer = model.vision_model.encoder.layers[-1]
    tokens = states[-2] + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(states[-2])))
    tokens = model.vision_model.post_layernorm(tokens + layer.mlp(layer.layer_norm2(tokens)))
    expected = F.normalize(model.visual_projection(tokens[:, 1:]), dim=-1).reshape(3, 2, 2, 24)
    assert torch.allclose(patch_embeds(F.normalize(rows, dim=-1), 2), expected, atol=1e-6)


@torch.inference_mode()
def test_the_only_patch_of_a_siglip_is_its_picture() -> None:
    model = siglip(patch_size=32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    picture = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    assert torch.allclose(PatchEncoder(model).get_image_features(pixels).pooler_output, picture, atol=1e-6)


@torch.inference_mode()
def test_patches_of_siglip_are_pooled_one_by_one() -> None:
    model = siglip(patch_size=16)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = model.vision_model(pixels).last_hidden_state
    alone = torch.stack([model.vision_model.head(tokens[:, place : place + 1]) for place in range(4)], dim=1)
    found = patch_embeds(PatchEncoder(model).get_image_features(pixels).pooler_output, 2)
    assert torch.allclose(found.flatten(1, 2), F.normalize(alone, dim=-1), atol=1e-6)


def test_another_image_tower_is_refused(tiny_ulip: Path) -> None:
    from cmcr_hf import UlipModel

    with pytest.raises(ValueError, match=r"got a UlipModel\. Locate with --method proposals"):
        PatchEncoder(UlipModel.from_pretrained(tiny_ulip))


def test_the_source_stays_in_its_mode(tiny_clip: Path) -> None:
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    encoder = PatchEncoder(model)
    encoder.train(encoder.training)
    assert not model.training
