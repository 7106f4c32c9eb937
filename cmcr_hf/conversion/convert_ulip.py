"""Convert a released ULIP checkpoint, such as `pointbert_ULIP-2.pt`, to a `UlipModel`: `cmcr convert ulip --help`.

Layout: `ULIP_WITH_IMAGE` of salesforce/ULIP (BSD-3-Clause): PointBERT behind `point_encoder.`, timm's ViT behind
`visual.`, CLIP's text transformer, and three projection matrices that multiply from the right.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil

from cmcr_hf.conversion.checkpoint import Checkpoint, convert_keys, count, load_weights, read_checkpoint, width
from cmcr_hf.conversion.plain import Weights, attention, batch_norm, clip_text, layer_norm, linear, quick_gelu
from cmcr_hf.conversion.proof import Proof, prove
from cmcr_hf.modeling.configuration_ulip import UlipConfig
from cmcr_hf.modeling.modeling_ulip import UlipModel

UPSTREAM = "the released checkpoint of a ULIP with PointBERT"
# The released file has 0.7 GB of weights, and may have an optimizer's state twice as large beside them.
MAX_BYTES = 2**32

KEYS: dict[str, str | None] = {
    r"point_encoder\.encoder\.first_conv\.0\.(\w+)": r"point_model.group_encoder.linear1.\1",
    r"point_encoder\.encoder\.first_conv\.1\.(\w+)": r"point_model.group_encoder.norm1.\1",
    r"point_encoder\.encoder\.first_conv\.3\.(\w+)": r"point_model.group_encoder.linear2.\1",
    r"point_encoder\.encoder\.second_conv\.0\.(\w+)": r"point_model.group_encoder.linear3.\1",
    r"point_encoder\.encoder\.second_conv\.1\.(\w+)": r"point_model.group_encoder.norm2.\1",
    r"point_encoder\.encoder\.second_conv\.3\.(\w+)": r"point_model.group_encoder.linear4.\1",
    r"point_encoder\.reduce_dim\.(\w+)": r"point_model.reduce_dim.\1",
    r"point_encoder\.cls_token": r"point_model.cls_token",
    r"point_encoder\.cls_pos": r"point_model.cls_position",
    r"point_encoder\.pos_embed\.0\.(\w+)": r"point_model.position1.\1",
    r"point_encoder\.pos_embed\.2\.(\w+)": r"point_model.position2.\1",
    r"point_encoder\.blocks\.blocks\.(\d+)\.norm([12])\.(\w+)": r"point_model.layers.\1.layer_norm\2.\3",
    r"point_encoder\.blocks\.blocks\.(\d+)\.attn\.qkv\.weight": r"point_model.layers.\1.attention.qkv.weight",
    r"point_encoder\.blocks\.blocks\.(\d+)\.attn\.proj\.(\w+)": r"point_model.layers.\1.attention.out_proj.\2",
    r"point_encoder\.blocks\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)": r"point_model.layers.\1.fc\2.\3",
    r"point_encoder\.norm\.(\w+)": r"point_model.layer_norm.\1",
    r"pc_projection": r"point_projection.weight",
    r"visual\.cls_token": r"vision_model.embeddings.cls_token",
    r"visual\.pos_embed": r"vision_model.embeddings.position_embeddings",
    r"visual\.patch_embed\.proj\.(\w+)": r"vision_model.embeddings.patch_embeddings.projection.\1",
    r"visual\.blocks\.(\d+)\.norm1\.(\w+)": r"vision_model.layers.\1.layernorm_before.\2",
    r"visual\.blocks\.(\d+)\.norm2\.(\w+)": r"vision_model.layers.\1.layernorm_after.\2",
    r"visual\.blocks\.(\d+)\.attn\.qkv\.(\w+)": r"vision_model.layers.\1.attention.{q,k,v}_proj.\2",
    r"visual\.blocks\.(\d+)\.attn\.proj\.(\w+)": r"vision_model.layers.\1.attention.o_proj.\2",
    r"visual\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)": r"vision_model.layers.\1.mlp.fc\2.\3",
    r"visual\.norm\.(\w+)": r"vision_model.layernorm.\1",
    r"image_projection": r"vision_projection.weight",
    r"token_embedding\.weight": r"text_model.embeddings.token_embedding.weight",
    r"positional_embedding": r"text_model.embeddings.position_embedding.weight",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)": r"text_model.encoder.layers.\1.layer_norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)": r"text_model.encoder.layers.\1.self_attn.{q,k,v}_proj.\2",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)": r"text_model.encoder.layers.\1.self_attn.out_proj.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)": r"text_model.encoder.layers.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)": r"text_model.encoder.layers.\1.mlp.fc2.\2",
    r"ln_final\.(\w+)": r"text_model.final_layer_norm.\1",
    r"text_projection": r"text_projection.weight",
    r"logit_scale": r"logit_scale",
}


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a released ULIP checkpoint under the names of [`UlipModel`].

    Args:
        state_dict: by upstream's keys, without `module.`.

    Raises:
        ValueError: a key is none of this architecture; names it.
    """
    converted = convert_keys(state_dict, KEYS, UPSTREAM)
    for name, tensor in converted.items():
        if name in ("point_projection.weight", "vision_projection.weight", "text_projection.weight"):
            # Upstream multiplies from the right: features @ projection.
            converted[name] = tensor.T.contiguous()
        elif name.startswith("point_model.group_encoder.linear") and tensor.ndim == 3:
            # Convolutions of length 1 are linear layers.
            converted[name] = tensor.flatten(1)
    return converted


def ulip_config(
    state_dict: Mapping[str, torch.Tensor], fields: Mapping[str, Mapping[str, Any]] | None = None
) -> UlipConfig:
    """Read the configuration from the shapes of a released checkpoint.

    Args:
        state_dict: by upstream's keys, without `module.`.
        fields: what shapes do not tell, by part of the configuration, where it is not that of the released models: 512
            groups of 32 points, and heads of 64.

    Raises:
        ValueError: a key is missing; names it.
    """
    point, parts = "point_encoder.", dict(fields or {})
    hidden = width(state_dict, f"{point}reduce_dim.weight")
    config: dict[str, Any] = {
        "projection_dim": width(state_dict, "pc_projection", 1),
        "point_config": {
            "input_channels": width(state_dict, f"{point}encoder.first_conv.0.weight", 1),
            "group_hidden_size": width(state_dict, f"{point}reduce_dim.weight", 1),
            "hidden_size": hidden,
            "intermediate_size": width(state_dict, f"{point}blocks.blocks.0.mlp.fc1.weight"),
            "num_hidden_layers": count(state_dict, r"point_encoder\.blocks\.blocks\.(\d+)\."),
            "num_attention_heads": max(1, hidden // 64),
            **parts.get("point_config", {}),
        },
    }
    if any(key.startswith("visual.") for key in state_dict):
        hidden = width(state_dict, "visual.pos_embed", 2)
        patch = width(state_dict, "visual.patch_embed.proj.weight", 2)
        config["vision_config"] = {
            "hidden_size": hidden,
            "intermediate_size": width(state_dict, "visual.blocks.0.mlp.fc1.weight"),
            "num_hidden_layers": count(state_dict, r"visual\.blocks\.(\d+)\."),
            "num_attention_heads": max(1, hidden // 64),
            "image_size": patch * round((width(state_dict, "visual.pos_embed", 1) - 1) ** 0.5),
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
            **parts.get("vision_config", {}),
        }
    if any(key.startswith("transformer.") for key in state_dict):
        vocabulary, hidden = (width(state_dict, "token_embedding.weight", axis) for axis in (0, 1))
        config["text_config"] = {
            "hidden_size": hidden,
            "intermediate_size": width(state_dict, "transformer.resblocks.0.mlp.c_fc.weight"),
            "num_hidden_layers": count(state_dict, r"transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": max(1, hidden // 64),
            "max_position_embeddings": width(state_dict, "positional_embedding"),
            "vocab_size": vocabulary,
            "hidden_act": "quick_gelu",
            # Upstream pools at the largest id, which is that of the end.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
            **parts.get("text_config", {}),
        }
    return UlipConfig(**config)


def read_ulip(path: str | Path, fields: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[UlipModel, Checkpoint]:
    """Read a released ULIP checkpoint, weights-only, as a [`UlipModel`] in eval mode.

    A file without the image or the text tower gives a model without it.

    Args:
        fields: as for [`ulip_config`].

    Raises:
        ValueError: the file is missing, damaged, larger than 4 GiB, names anything but tensors and the options of its
            training, or holds another architecture; names it.
    """
    checkpoint = read_checkpoint(path, max_bytes=MAX_BYTES)
    try:
        weights = convert_state_dict(checkpoint.weights)
        model = UlipModel(ulip_config(checkpoint.weights, fields))
        load_weights(model, weights, UPSTREAM)
    except ValueError as error:
        raise ValueError(f"Cannot convert {path}: {error}") from error
    return model.eval(), checkpoint


def image_processor(model: UlipModel) -> CLIPImageProcessorPil:
    """Return the preprocessing that ULIP evaluates images with: torchvision's defaults with ImageNet's statistics."""
    vision: Any = model.config.vision_config
    return CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size={"height": vision.image_size, "width": vision.image_size},
        resample=2,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def plain_point_clouds(clouds: torch.Tensor, weights: Weights, config: UlipConfig) -> torch.Tensor:
    """Embed clouds `(clouds, points, channels)` by upstream's names: `(clouds, projection_dim)`, not normalised."""
    point: Any = config.point_config
    encoder = "point_encoder."
    centers, groups = zip(*[_plain_groups(cloud, point.num_groups, point.group_size) for cloud in clouds], strict=True)
    center = torch.stack(centers)
    x = torch.stack(groups).flatten(0, 1).transpose(1, 2)
    for part in ("first_conv", "second_conv"):
        name = f"{encoder}encoder.{part}"
        x = F.conv1d(x, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
        x = batch_norm(x, weights, f"{name}.1").relu()
        x = F.conv1d(x, weights[f"{name}.3.weight"], weights[f"{name}.3.bias"])
        maximum = x.amax(dim=2, keepdim=True)
        x = torch.cat([maximum.expand_as(x), x], dim=1)
    tokens = linear(maximum.squeeze(2).unflatten(0, center.shape[:2]), weights, f"{encoder}reduce_dim")
    position = linear(F.gelu(linear(center, weights, f"{encoder}pos_embed.0")), weights, f"{encoder}pos_embed.2")
    x = torch.cat([weights[f"{encoder}cls_token"].expand(len(tokens), -1, -1), tokens], dim=1)
    position = torch.cat([weights[f"{encoder}cls_pos"].expand(len(tokens), -1, -1), position], dim=1)
    for layer in range(point.num_hidden_layers):
        x = _plain_block(x + position, weights, f"{encoder}blocks.blocks.{layer}", point.num_attention_heads, 1e-5)
    x = layer_norm(x, weights, f"{encoder}norm")
    return torch.cat([x[:, 0], x[:, 1:].amax(dim=1)], dim=1) @ weights["pc_projection"]


def _plain_groups(cloud: torch.Tensor, number: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample centres farthest from each other, from the point of the smallest coordinates on, and their neighbours."""
    coordinates = cloud[:, :3]
    chosen = [min(range(len(cloud)), key=lambda row: coordinates[row].tolist())]
    nearest = torch.full((len(cloud),), torch.inf)
    while len(chosen) < number:
        nearest = torch.minimum(nearest, (coordinates - coordinates[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(nearest.argmax()))
    center = coordinates[chosen]
    groups = cloud[torch.cdist(center.double(), coordinates.double()).topk(size, largest=False).indices].clone()
    groups[..., :3] -= center[:, None]
    return center, groups


def _plain_block(x: torch.Tensor, weights: Weights, name: str, heads: int, eps: float) -> torch.Tensor:
    """Apply a block of timm's layout, as the point encoder and the image tower have it."""
    attended = attention(linear(layer_norm(x, weights, f"{name}.norm1", eps), weights, f"{name}.attn.qkv"), heads)
    x = x + linear(attended, weights, f"{name}.attn.proj")
    hidden = F.gelu(linear(layer_norm(x, weights, f"{name}.norm2", eps), weights, f"{name}.mlp.fc1"))
    return x + linear(hidden, weights, f"{name}.mlp.fc2")


def plain_images(pixel_values: torch.Tensor, weights: Weights, config: UlipConfig) -> torch.Tensor:
    """Embed images `(images, 3, height, width)` by upstream's names: `(images, projection_dim)`, not normalised."""
    vision: Any = config.vision_config
    patch = "visual.patch_embed.proj"
    x = F.conv2d(pixel_values, weights[f"{patch}.weight"], weights[f"{patch}.bias"], stride=vision.patch_size)
    x = torch.cat([weights["visual.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + weights["visual.pos_embed"]
    for layer in range(vision.num_hidden_layers):
        x = _plain_block(x, weights, f"visual.blocks.{layer}", vision.num_attention_heads, 1e-6)
    return layer_norm(x, weights, "visual.norm", 1e-6)[:, 0] @ weights["image_projection"]


@torch.no_grad()
def prove_ulip(model: UlipModel, checkpoint: Checkpoint) -> Proof:
    """Compare a converted model with a plain reading of the file, on random clouds, images and texts.

    Upstream samples centres from a random start; both sides here start at the point of the smallest coordinates.

    Raises:
        ValueError: they differ by more than 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in checkpoint.weights.items()
    }
    config = model.config
    point: Any = config.point_config
    vision: Any = config.vision_config
    text: Any = config.text_config
    # On a grid, where both add up distances without rounding.
    clouds = torch.randint(-512, 513, (2, 2048, point.input_channels), generator=generator) / 512
    found = {"point cloud": model.get_point_cloud_features(clouds).pooler_output}
    expected = {"point cloud": plain_point_clouds(clouds, weights, config)}
    if vision is not None:
        pixel_values = torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)
        found["image"] = model.get_image_features(pixel_values).pooler_output
        expected["image"] = plain_images(pixel_values, weights, config)
    if text is not None:
        input_ids = torch.randint(1, text.vocab_size - 2, (4, text.max_position_embeddings), generator=generator)
        input_ids[:, 0] = text.bos_token_id
        for row, end in enumerate((2, 5, 9, text.max_position_embeddings - 1)):
            input_ids[row, end], input_ids[row, end + 1 :] = text.eos_token_id, 0
        found["text"] = model.get_text_features(input_ids).pooler_output
        expected["text"] = clip_text(input_ids, weights, text.num_attention_heads, quick_gelu)
    return prove(found, expected)


if __name__ == "__main__":
    from cmcr_hf.cli import main

    sys.exit(main(["convert", "ulip", *sys.argv[1:]]))
