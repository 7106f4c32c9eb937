"""Read a released ULIP checkpoint as the weights of a `UlipModel`.

Layout: `ULIP_WITH_IMAGE` of salesforce/ULIP (BSD-3-Clause): PointBERT behind `point_encoder.`, timm's ViT behind
`visual.`, CLIP's text transformer, and three projection matrices that multiply from the right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

# Pattern of an upstream key (behind `module.`): the key here. `None` drops what has no counterpart.
KEYS = {
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

    Raises:
        ValueError: a key is none of this architecture; names it.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix("module.")
        matches = [(match, new) for pattern, new in KEYS.items() if (match := re.fullmatch(pattern, name))]
        if not matches:
            raise ValueError(f"Unknown key {key!r}: expected the state dict of a ULIP_WITH_IMAGE with PointBERT.")
        match, new = matches[0]
        target = match.expand(new)
        if name.endswith("_projection"):
            # Upstream multiplies from the right: features @ projection.
            tensor = tensor.T.contiguous()
        elif name.startswith("point_encoder.encoder.") and tensor.ndim == 3:
            # Convolutions of length 1 are linear layers.
            tensor = tensor.squeeze(-1)
        if "{q,k,v}" in target:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[target.replace("{q,k,v}", part)] = rows.contiguous()
        else:
            converted[target] = tensor
    return converted
