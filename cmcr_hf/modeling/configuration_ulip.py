# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""ULIP configuration: a point encoder, and the image and text towers that it was aligned with."""

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, PreTrainedConfig, ViTConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class UlipPointConfig(PreTrainedConfig):
    r"""Configuration of the point encoder of a [`UlipModel`]: PointBERT over groups of neighbouring points.

    The defaults are those of the released ULIP-2 checkpoint (512-d, xyz).

    Args:
        input_channels:
            Numbers a point: 3 for xyz, 6 for xyz and rgb. Only the first three are coordinates.
        num_groups, group_size:
            Centres that farthest point sampling picks, and nearest neighbours of each, the centre itself included.
        group_hidden_size:
            Width of the token that the group encoder makes of a group.
        drop_path_rate:
            Stochastic depth in training, growing linearly to this rate at the last layer.
    """

    model_type = "ulip_point_model"
    base_config_key = "point_config"

    input_channels: int = 3
    num_groups: int = 512
    group_size: int = 32
    group_hidden_size: int = 256
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self):
        """Check that the fields agree with each other (called by transformers at creation and at saving)."""
        super().validate_architecture()
        names = ("num_groups", "group_size", "group_hidden_size", "hidden_size", "intermediate_size")
        for name in (*names, "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.input_channels < 3:
            raise ValueError(f"input_channels must be at least 3, the coordinates, got {self.input_channels}.")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}.")


@strict
class UlipConfig(PreTrainedConfig):
    r"""Configuration of a [`UlipModel`].

    Args:
        point_config:
            The point encoder.
        vision_config, text_config:
            The image tower (SLIP's ViT-B/16) and the text tower (CLIP's) of the released checkpoint, each optional: a
            connection that has CLIP for its images and texts needs neither.
        projection_dim:
            Width of the embeddings.
        logit_scale_init_value:
            Natural logarithm of the initial logit scale, CLIP's.
    """

    model_type = "ulip"
    sub_configs_defaults = {  # noqa: RUF012  (the class attribute that transformers reads)
        "point_config": SubConfigSpec(config_class=UlipPointConfig),
        "vision_config": SubConfigSpec(config_class=ViTConfig, optional=True),
        "text_config": SubConfigSpec(config_class=CLIPTextConfig, optional=True),
    }

    point_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592

    def validate_architecture(self):
        """Check the width (called by transformers at creation and at saving)."""
        super().validate_architecture()
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, got {self.projection_dim}.")


UlipConfig.register_for_auto_class("AutoConfig")

__all__ = ["UlipConfig", "UlipPointConfig"]
