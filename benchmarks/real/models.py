"""Small contrastive source models: a residual CNN for the items, and one of two text towers over word vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

TEXT_TOWERS = ("bag-of-words", "attention")


@strict
class SmallDualEncoderConfig(PreTrainedConfig):
    """Configuration of a small image-text or audio-text model.

    Args:
        channels: of the input, 3 for images, 1 for log-mels.
        stem_stride: of the first convolution, 5 x 5, in height (frequency) and width (time).
        widths: channels of the residual blocks; each block but the first halves both sides.
        text_tower: "bag-of-words" sums the word vectors, "attention" weighs tokens by what stands beside them.
        mean, std: of the input values 0..255, by which they are normalised.
    """

    model_type = "small_dual_encoder"

    channels: int = 3
    stem_stride: list[int] | tuple[int, ...] = (2, 2)
    widths: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    text_tower: str = "bag-of-words"
    vocab_size: int = 1000
    pad_token_id: int = 0
    word_dim: int = 192
    text_hidden_dim: int = 512
    projection_dim: int = 128
    dropout: float | int = 0.1
    mean: float | int = 127.5
    std: float | int = 64.0
    logit_scale_init_value: float | int = 2.6592

    def validate_architecture(self) -> None:
        """Check that the text tower exists (called by transformers at creation and at saving)."""
        super().validate_architecture()
        if self.text_tower not in TEXT_TOWERS:
            raise ValueError(f"text_tower is {self.text_tower!r}, expected one of {TEXT_TOWERS}.")


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.norm1(self.conv1(hidden)))
        return F.relu(self.shortcut(hidden) + self.norm2(self.conv2(inner)))


class ItemTower(nn.Module):
    """Embed images or log-mels: `(n, channels, height, width)`, values 0..255, to `(n, projection_dim)`."""

    def __init__(self, config: SmallDualEncoderConfig) -> None:
        super().__init__()
        self.mean, self.std = config.mean, config.std
        widths = list(config.widths)
        height, width = config.stem_stride
        self.stem = nn.Conv2d(config.channels, widths[0], 5, (height, width), 2, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(before, after, 1 if index == 0 else 2)
                for index, (before, after) in enumerate(zip([widths[0], *widths], widths, strict=False))
            )
        )
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(widths[-1], config.projection_dim)
        # Centred embeddings cannot collapse into one narrow cone, where such small towers may stay for long.
        self.centre = nn.BatchNorm1d(config.projection_dim, affine=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = ((values - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        hidden = self.blocks(F.relu(self.norm(self.stem(values))))
        # The mean tells what goes on throughout, the maximum what happens once.
        pooled = hidden.mean(dim=(2, 3)) + hidden.amax(dim=(2, 3))
        return self.centre(self.projection(self.dropout(pooled)))


class TextTower(nn.Module):
    """Embed token ids `(n, tokens)` to `(n, projection_dim)`, over word vectors that training leaves as they are."""

    def __init__(self, config: SmallDualEncoderConfig) -> None:
        super().__init__()
        self.pad_token_id = config.pad_token_id
        self.attends = config.text_tower == "attention"
        self.embedding = nn.Embedding(config.vocab_size, config.word_dim)
        if self.attends:
            self.context = nn.Conv1d(config.word_dim, config.word_dim, 3, padding=1)
            self.score = nn.Linear(config.word_dim, 1)
        self.norm = nn.LayerNorm(config.word_dim)
        self.hidden = nn.Linear(config.word_dim, config.text_hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(config.text_hidden_dim, config.projection_dim)
        self.centre = nn.BatchNorm1d(config.projection_dim, affine=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        tokens = self.embedding(input_ids)
        kept = input_ids.ne(self.pad_token_id)[..., None]
        if self.attends:
            beside = F.gelu(self.context((tokens * kept).mT).mT)
            scores = self.score(beside).masked_fill(~kept, -torch.inf)
            # An empty text has no token to attend to.
            tokens = tokens * torch.nan_to_num(scores.softmax(dim=1))
        pooled = self.norm((tokens * kept).sum(dim=1))
        return self.centre(self.projection(self.dropout(F.gelu(self.hidden(pooled)))))


class SmallDualEncoder(PreTrainedModel):
    """Both towers of one space, and the scale of its cosines."""

    config: SmallDualEncoderConfig
    config_class = SmallDualEncoderConfig
    base_model_prefix = ""
    item_modality: str

    def __init__(self, config: SmallDualEncoderConfig) -> None:
        super().__init__(config)
        self.item_tower = ItemTower(config)
        self.text_tower = TextTower(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, SmallDualEncoder):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        else:
            super()._init_weights(module)

    def get_text_features(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        """Embed texts: `.pooler_output` is `(n, projection_dim)`, not normalised."""
        return BaseModelOutputWithPooling(pooler_output=self.text_tower(input_ids))


class SmallImageTextModel(SmallDualEncoder):
    """CLIP's role: images and texts in one space."""

    main_input_name = "pixel_values"
    item_modality = "image"

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Embed images `(n, 3, 64, 64)`, 0..255: `.pooler_output` is `(n, projection_dim)`, not normalised."""
        return BaseModelOutputWithPooling(pooler_output=self.item_tower(pixel_values))


class SmallAudioTextModel(SmallDualEncoder):
    """CLAP's role: sounds and texts in one space."""

    main_input_name = "input_features"
    item_modality = "audio"

    def get_audio_features(self, input_features: torch.Tensor) -> BaseModelOutputWithPooling:
        """Embed log-mels `(n, 1, 64, 248)`, 0..255: `.pooler_output` is `(n, projection_dim)`, not normalised."""
        return BaseModelOutputWithPooling(pooler_output=self.item_tower(input_features))
