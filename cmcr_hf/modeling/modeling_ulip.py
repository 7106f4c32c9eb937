# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""ULIP: point clouds, images and texts in one contrastive space, in pure torch.

Method: "ULIP: Learning a Unified Representation of Language, Images, and Point Clouds for 3D Understanding" (arXiv
2212.05171) and ULIP-2 (2305.08275), whose point encoder is PointBERT (2111.14819). Layout and behaviour are those of
the released `pointbert_ULIP-2.pt`, but for the sampling, which starts at a point of the cloud's own, not at a random
one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel, ViTModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ulip import UlipConfig, UlipPointConfig
from .grouping_ulip import group_points

# The best of several numbers for groups of 32 points.
GROUPS_AT_ONCE = 64


@dataclass
class UlipOutput(ModelOutput):
    """Output of [`UlipModel`]. What was not given as input is `None`.

    Args:
        logits_per_point_cloud_image, logits_per_point_cloud_text: `(clouds, images)` and `(clouds, texts)`, scaled
            cosines.
        point_cloud_embeds, image_embeds, text_embeds: `(rows, projection_dim)`, unit rows.
    """

    logits_per_point_cloud_image: torch.Tensor | None = None
    logits_per_point_cloud_text: torch.Tensor | None = None
    point_cloud_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class UlipGroupEncoder(nn.Module):
    """Embed groups of points (mini-PointNet): `(groups, points, channels)` to `(groups, group_hidden_size)`."""

    def __init__(self, config: UlipPointConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.input_channels, 128)
        self.norm1 = nn.BatchNorm1d(128)
        self.linear2 = nn.Linear(128, 256)
        self.linear3 = nn.Linear(512, 512)
        self.norm2 = nn.BatchNorm1d(512)
        self.linear4 = nn.Linear(512, config.group_hidden_size)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self._encode(groups)
        # Few enough that what is between the layers stays in the processor's cache.
        return torch.cat([self._encode(part) for part in groups.split(GROUPS_AT_ONCE)])

    def _encode(self, groups: torch.Tensor) -> torch.Tensor:
        number, size, _ = groups.shape
        first: tuple[torch.Tensor, torch.Tensor] = (self.linear1.weight, self.linear1.bias)
        second: tuple[torch.Tensor, torch.Tensor] = (self.linear3.weight, self.linear3.bias)
        if not self.training:
            first, second = _folded(self.norm1, *first), _folded(self.norm2, *second)
        points = F.linear(groups.flatten(0, 1), *first)
        points = self.linear2((self.norm1(points) if self.training else points).relu_())
        # The layer sees [maximum of the group, point]. The half that sees the maximum is computed once a group.
        maximum = points.unflatten(0, (number, size)).amax(dim=1)
        weight, bias = second
        of_maximum, of_point = weight.split(256, dim=1)
        points = F.linear(points, of_point).unflatten(0, (number, size))
        points = points.add_(F.linear(maximum, of_maximum, bias)[:, None]).flatten(0, 1)
        points = (self.norm2(points) if self.training else points).relu_()
        return self.linear4(points).unflatten(0, (number, size)).amax(dim=1)


def _folded(norm: Any, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a linear layer and the BatchNorm in eval mode behind it, as one layer."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return weight * scale[:, None], (bias - norm.running_mean) * scale + norm.bias


class UlipPointAttention(nn.Module):
    def __init__(self, config: UlipPointConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(rows, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).reshape(rows, tokens, width))


class UlipPointLayer(nn.Module):
    def __init__(self, config: UlipPointConfig, drop_path_rate: float):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = UlipPointAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self._drop_path(self.attention(self.layer_norm1(hidden_states)))
        mlp = self.fc2(F.gelu(self.fc1(self.layer_norm2(hidden_states))))
        return hidden_states + self._drop_path(mlp)

    def _drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        """Drop the branch of some rows in training (stochastic depth)."""
        if not self.training or self.drop_path_rate == 0:
            return branch
        keep = 1 - self.drop_path_rate
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


class UlipPointModel(nn.Module):
    """PointBERT: clouds to `[class token, maximum over the groups]`, `(clouds, 2 * hidden_size)`."""

    def __init__(self, config: UlipPointConfig):
        super().__init__()
        self.config = config
        self.group_encoder = UlipGroupEncoder(config)
        self.reduce_dim = nn.Linear(config.group_hidden_size, config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position1 = nn.Linear(3, 128)
        self.position2 = nn.Linear(128, config.hidden_size)
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path_rate * layer / last for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([UlipPointLayer(config, rate) for rate in rates])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, point_clouds: torch.Tensor, num_points: torch.Tensor | None = None, seed: int | None = None
    ) -> BaseModelOutputWithPooling:
        centers, groups = group_points(
            point_clouds, self.config.num_groups, self.config.group_size, num_points=num_points, seed=seed
        )
        dtype = self.reduce_dim.weight.dtype
        centers, groups = centers.to(dtype), groups.to(dtype)
        tokens = self.reduce_dim(self.group_encoder(groups.flatten(0, 1)).unflatten(0, centers.shape[:2]))
        positions = self.position2(F.gelu(self.position1(centers)))
        hidden_states = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        positions = torch.cat([self.cls_position.expand(len(tokens), -1, -1), positions], dim=1)
        for layer in self.layers:
            # PointBERT adds the position again before every layer.
            hidden_states = layer(hidden_states + positions)
        hidden_states = self.layer_norm(hidden_states)
        pooled = torch.cat([hidden_states[:, 0], hidden_states[:, 1:].amax(dim=1)], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class UlipPreTrainedModel(PreTrainedModel):
    config: UlipConfig
    config_class = UlipConfig
    base_model_prefix = "ulip"
    main_input_name = "point_clouds"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _supports_sdpa = True
    _no_split_modules = ["UlipPointLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        point_config: Any = self.config.point_config
        std = point_config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, UlipPointModel):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.cls_position, std=std)
        elif isinstance(module, UlipModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        else:
            super()._init_weights(module)


class UlipModel(UlipPreTrainedModel):
    """Point encoder of ULIP, with its image and text towers where the configuration has them.

    Example:
        >>> model = UlipModel(UlipConfig()).eval()  # random weights
        >>> clouds = torch.randn(2, 1024, 3)
        >>> model.get_point_cloud_features(clouds).pooler_output.shape
        torch.Size([2, 512])
    """

    def __init__(self, config: UlipConfig):
        super().__init__(config)
        point: Any = config.point_config
        vision: Any = config.vision_config
        text: Any = config.text_config
        width = config.projection_dim
        self.point_model = UlipPointModel(point)
        self.point_projection = nn.Linear(2 * point.hidden_size, width, bias=False)
        if vision is not None:
            self.vision_model = ViTModel(vision, add_pooling_layer=False)
            self.vision_projection = nn.Linear(vision.hidden_size, width, bias=False)
        if text is not None:
            self.text_model = CLIPTextModel(text)
            self.text_projection = nn.Linear(text.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @can_return_tuple
    def get_point_cloud_features(
        self,
        point_clouds: torch.Tensor,
        num_points: torch.Tensor | None = None,
        seed: int | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed point clouds: `.pooler_output` is `(clouds, projection_dim)`, not normalised.

        Args:
            point_clouds: `(clouds, points, input_channels)`, at least `group_size` points each.
            num_points: `(clouds,)`, how many points of each cloud count; the rest is padding without effect.
            seed: where farthest point sampling starts, see [`group_points`].
        """
        channels = self.point_model.config.input_channels
        if point_clouds.ndim != 3 or point_clouds.shape[2] != channels:
            raise ValueError(
                f"Expected point clouds (clouds, points, {channels}), got {tuple(point_clouds.shape)}. The model is "
                f"built for {channels} numbers a point (input_channels)."
            )
        outputs = self.point_model(point_clouds, num_points, seed)
        outputs.pooler_output = self.point_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """Embed images `(images, channels, height, width)`: `.pooler_output` is `(images, projection_dim)`.

        Raises:
            ValueError: the model has no image tower.
        """
        if self.config.vision_config is None:
            raise ValueError("This UlipModel has no image tower (vision_config is None): use CLIP's for images.")
        outputs = self.vision_model(pixel_values=pixel_values, **kwargs)
        outputs.pooler_output = self.vision_projection(outputs.last_hidden_state[:, 0])
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """Embed texts `(texts, tokens)`: `.pooler_output` is `(texts, projection_dim)`, not normalised.

        Raises:
            ValueError: the model has no text tower.
        """
        if self.config.text_config is None:
            raise ValueError("This UlipModel has no text tower (text_config is None): use CLIP's for texts.")
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def forward(
        self,
        point_clouds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_points: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> tuple | UlipOutput:
        """Embed any subset of modalities, and compare clouds with images and texts."""
        clouds = images = texts = None
        if point_clouds is not None:
            clouds = F.normalize(self.get_point_cloud_features(point_clouds, num_points).pooler_output, dim=-1)
        if pixel_values is not None:
            images = F.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        if input_ids is not None:
            texts = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)
        if clouds is None and images is None and texts is None:
            raise ValueError("Expected at least one of point_clouds, pixel_values and input_ids.")
        scale = self.logit_scale.exp()
        output = UlipOutput(point_cloud_embeds=clouds, image_embeds=images, text_embeds=texts)
        if clouds is not None and images is not None:
            output.logits_per_point_cloud_image = scale * clouds @ images.T
        if clouds is not None and texts is not None:
            output.logits_per_point_cloud_text = scale * clouds @ texts.T
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()


# Every saved folder carries the code, as that of a CMCRModel does.
UlipModel.register_for_auto_class("AutoModel")

__all__ = ["UlipModel", "UlipOutput", "UlipPreTrainedModel"]
