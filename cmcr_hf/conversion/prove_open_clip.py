"""Prove that a converted open_clip CLIP gives what open_clip gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from ..sources.upstream import import_upstream
from .checkpoint import Checkpoint
from .convert_open_clip import plain_names
from .plain import Weights, clip_block, clip_text, layer_norm, quick_gelu
from .proof import PLAIN, Proof, prove


@torch.no_grad()
def prove_clip(model: CLIPModel, checkpoint: Checkpoint, *, bound: float = 1e-5) -> Proof:
    """Compare a converted model with the weights it was converted from, on fixed random images and texts.

    With open_clip's own model where it is installed, else with a plain reading of the file; the proof names which.

    Raises:
        ValueError: the embeddings differ by more than `bound`.
    """
    config: Any = model.config
    vision, text = config.vision_config, config.text_config
    weights = {key: tensor.float() for key, tensor in plain_names(checkpoint.weights).items() if key != "attn_mask"}
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(4, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    length, end = text.max_position_embeddings, text.eos_token_id
    input_ids = torch.randint(0, end - 1, (4, length), generator=generator)
    input_ids[:, 0] = end - 1
    for row, last in enumerate((1, length // 3, length // 2, length - 1)):
        input_ids[row, last] = end
        # Upstream pads with zeros.
        input_ids[row, last + 1 :] = 0
    try:
        open_clip = import_upstream("open_clip", "open-clip")
    except ImportError:
        reference = PLAIN
        expected = plain_embeddings(pixel_values, input_ids, weights, config)
    else:
        reference = f"open_clip_torch {open_clip.__version__}"
        original: Any = _original(open_clip, config, weights)
        expected = {"image": original.encode_image(pixel_values), "text": original.encode_text(input_ids)}
    found = {
        "image": model.get_image_features(pixel_values).pooler_output,
        "text": model.get_text_features(input_ids).pooler_output,
    }
    return prove(found, expected, reference, bound=bound)


def plain_embeddings(
    pixel_values: torch.Tensor, input_ids: torch.Tensor, weights: Weights, config: CLIPConfig
) -> dict[str, torch.Tensor]:
    """Embed images `(images, channels, height, width)` and texts `(texts, tokens)` by upstream's names.

    Returns `image` and `text`, `(rows, projection_dim)`, not normalised.
    """
    vision: Any = config.vision_config
    text: Any = config.text_config
    activation = quick_gelu if vision.hidden_act == "quick_gelu" else F.gelu
    patches = F.conv2d(pixel_values, weights["visual.conv1.weight"], stride=vision.patch_size)
    first = weights["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + weights["visual.positional_embedding"]
    x = layer_norm(x, weights, "visual.ln_pre")
    for layer in range(vision.num_hidden_layers):
        name = f"visual.transformer.resblocks.{layer}"
        x = clip_block(x, weights, name, vision.num_attention_heads, activation)
    return {
        "image": layer_norm(x[:, 0], weights, "visual.ln_post") @ weights["visual.proj"],
        "text": clip_text(input_ids, weights, text.num_attention_heads, activation),
    }


def _original(open_clip: Any, config: Any, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return open_clip's own model with the weights of a checkpoint."""
    vision, text = config.vision_config, config.text_config
    original: torch.nn.Module = open_clip.CLIP(
        embed_dim=config.projection_dim,
        vision_cfg={
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        },
        text_cfg={
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
        quick_gelu=vision.hidden_act == "quick_gelu",
    )
    scale = original.get_parameter("logit_scale")
    original.load_state_dict({**weights, "logit_scale": weights["logit_scale"].reshape(scale.shape)})
    return original.eval()
