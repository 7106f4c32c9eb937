"""Embeddings of the patches of a picture in the space of its source, a CLIP or a SigLIP.

The value path of MaskCLIP ("Extract Free Dense Labels from CLIP", Zhou et al., arXiv 2112.01071): in the last
attention, every token keeps its own value instead of a mix of all values, and goes the rest of the way as the pooled
embedding does. In CLIP the last attention is that of the last layer, whose residual and MLP stay as in the authors'
code (chongzhou96/MaskCLIP, backbones/vit.py); in SigLIP it is that of the pooling head, as MaskCLIP treats the
attention pooling of CLIP's ResNets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, PreTrainedModel, SiglipModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling.configuration_cmcr import source_embedding_dim
from ..modeling.sources_cmcr import normalize


class PatchEncoder(nn.Module):
    """The image tower of a source whose embedding of a picture is that of all its patches.

    `get_image_features` gives rows `(images, patches * width of the source)`: the unit embeddings of the patches, from
    left to right and from top to bottom. So a store keeps them, scaled to length 1 as all rows are, as it keeps those
    of pictures, and [`patch_embeds`] takes them apart. They are in the source's space, before the projector.

    Args:
        source: a CLIPModel or a SiglipModel of transformers.

    Raises:
        ValueError: it is another model.
    """

    def __init__(self, source: PreTrainedModel) -> None:
        super().__init__()
        if not isinstance(source, (CLIPModel, SiglipModel)):
            raise ValueError(
                f"Expected an image source whose patches can be embedded, a CLIPModel or SiglipModel, got a "
                f"{type(source).__name__}. Locate with --method proposals, which takes every source."
            )
        self._source: Any = source
        vision: Any = source.config.vision_config
        # Patches of a row, and of a column.
        self.side: int = vision.image_size // vision.patch_size
        # Width of the embedding of a picture.
        self.dim: int = self.side**2 * (source_embedding_dim(source.config) or 0)
        self.device, self.dtype = source.device, source.dtype
        self.eval()

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Embed square pictures `(images, 3, height, width)`, of the size that the tower has positions for."""
        tower = self._source.vision_model
        if isinstance(self._source, CLIPModel):
            tokens = self._source.visual_projection(tower.post_layernorm(_own_values(tower, pixel_values)[:, 1:]))
        else:
            tokens = _pooled_alone(tower.head, tower(pixel_values).last_hidden_state)
        rows: Any = normalize(tokens).flatten(1)
        return BaseModelOutputWithPooling(pooler_output=rows)


def patch_embeds(rows: torch.Tensor, side: int) -> torch.Tensor:
    """Return the embeddings of patches, `(images, side, side, dim)`, of rows that a [`PatchEncoder`] gave."""
    return normalize(rows.reshape(len(rows), side, side, -1))


def _own_values(tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the tokens of a CLIP image tower, of which the last layer has each attend to itself alone."""
    tokens = tower.pre_layrnorm(tower.embeddings(pixel_values))
    *layers, last = tower.encoder.layers
    for layer in layers:
        tokens = layer(tokens, None)
    tokens = tokens + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(tokens)))
    mixed: torch.Tensor = tokens + last.mlp(last.layer_norm2(tokens))
    return mixed


def _pooled_alone(head: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the attention pooling of SigLIP makes of each token when it is the only one."""
    attention, width = head.attention, tokens.shape[-1]
    values = F.linear(tokens, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    pooled = attention.out_proj(values)
    mixed: torch.Tensor = pooled + head.mlp(head.layernorm(pooled))
    return mixed
