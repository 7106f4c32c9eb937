"""Read the weights of LAION-CLAP by upstream's own names, in plain torch operations and float64.

Against this the converted model is compared where laion_clap itself is not at hand. It follows clap_module/htsat.py,
feature_fusion.py and model.py of laion_clap 1.1.7, and shares no code with transformers' ClapModel.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F

from cmcr_hf.conversion.plain import Weights, batch_norm, layer_norm, linear

PAD = 1  # RoBERTa's padding token, behind which its positions begin.


def audio_outputs(weights: Weights, input_features: torch.Tensor, is_longer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what HTSAT and its projection give for log-mels, the intermediate outputs by name.

    Args:
        weights: upstream's state dict, without `module.`.
        input_features: log-mels in dB `(clips, 1, frames, mels)`; `(clips, 4, frames, mels)` for a fused model, the
            shrunk clip first and then three parts of it.
        is_longer: `(clips,)`, the clips whose parts are fused in; of no effect on an unfused model.

    Returns:
        `patch_embed` `(clips, patches, width)`, `stage0` and so on after their downsampling, `norm`, `pooled`
        `(clips, width)` and `projected` `(clips, projection_dim)`, not of unit length.
    """
    audio = _part(weights, "audio_branch.")
    x = batch_norm(input_features.double().transpose(1, 3), audio, "bn0").transpose(1, 3)
    patch = audio["patch_embed.proj.weight"].shape[-1]
    # As many windows as the mask of the first shifted block knows.
    grid = isqrt(len(audio["layers.0.blocks.1.attn_mask"])) * _window(_part(audio, "layers.0.blocks.1.attn."))
    x = _patches(audio, _image(x, grid * patch), is_longer.flatten())
    outputs = {"patch_embed": x}
    stage = 0
    while layers := _part(audio, f"layers.{stage}."):
        block = 0
        while part := _part(layers, f"blocks.{block}."):
            x = _block(x, part, shifted=block % 2 == 1)
            block += 1
        if "downsample.reduction.weight" in layers:
            x = _merge(x, layers)
        outputs[f"stage{stage}"] = x
        stage += 1
    outputs["norm"] = layer_norm(x, audio, "norm")
    # Upstream groups the tokens by frequency first, which does not change their mean.
    outputs["pooled"] = outputs["norm"].mean(dim=1)
    outputs["projected"] = _project(outputs["pooled"], weights, "audio_projection")
    return outputs


def text_outputs(
    weights: Weights, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, heads: int
) -> dict[str, torch.Tensor]:
    """Return what RoBERTa and its projection give for tokens `(texts, length)`, the intermediate outputs by name.

    Args:
        weights: upstream's state dict, without `module.`.
        attention_mask: 1 for a token, 0 for padding.
        heads: of each layer, which no shape tells.

    Returns:
        `embeddings` `(texts, length, width)`, `layer0` and so on, `pooled` `(texts, width)` behind the tanh, and
        `projected` `(texts, projection_dim)`, not of unit length.
    """
    text = _part(weights, "text_branch.")
    kept = (input_ids != PAD).long()
    positions = kept.cumsum(dim=1) * kept + PAD
    x = sum(
        text[f"embeddings.{name}_embeddings.weight"][rows]
        for name, rows in (("word", input_ids), ("position", positions), ("token_type", torch.zeros_like(input_ids)))
    )
    x = layer_norm(torch.as_tensor(x), text, "embeddings.LayerNorm")
    outputs = {"embeddings": x}
    hidden = (attention_mask == 0)[:, None, None, :]
    layer = 0
    while part := _part(text, f"encoder.layer.{layer}."):
        q, k, v = (
            linear(x, part, f"attention.self.{name}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        attended = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v
        dense = linear(attended.transpose(1, 2).flatten(2), part, "attention.output.dense")
        x = layer_norm(x + dense, part, "attention.output.LayerNorm")
        dense = linear(F.gelu(linear(x, part, "intermediate.dense")), part, "output.dense")
        x = layer_norm(x + dense, part, "output.LayerNorm")
        outputs[f"layer{layer}"] = x
        layer += 1
    outputs["pooled"] = linear(x[:, 0], text, "pooler.dense").tanh()
    outputs["projected"] = _project(outputs["pooled"], weights, "text_projection")
    return outputs


def _image(x: torch.Tensor, size: int) -> torch.Tensor:
    """Make of `(clips, channels, frames, mels)` a square image: time in equal parts, below one another."""
    mels = x.shape[-1]
    parts = size // mels
    x = F.interpolate(x, (size * parts, mels), mode="bicubic", align_corners=True)
    x = x.transpose(2, 3).unflatten(3, (parts, -1))
    return x.transpose(2, 3).flatten(2, 3)


def _patches(audio: Weights, image: torch.Tensor, is_longer: torch.Tensor) -> torch.Tensor:
    patch = audio["patch_embed.proj.weight"].shape[-1]
    x = _conv(image[:, :1], audio, "patch_embed.proj", (patch, patch))
    if "patch_embed.mel_conv2d.weight" in audio and is_longer.any():
        parts = image[is_longer, 1:]
        local = _conv(parts.flatten(0, 1)[:, None], audio, "patch_embed.mel_conv2d", (patch, 3 * patch))
        # The three parts side by side are narrower than the image by what their strides leave over.
        local = local.unflatten(0, parts.shape[:2]).permute(0, 2, 3, 1, 4).flatten(3)
        local = F.pad(local, (0, x.shape[-1] - local.shape[-1]))
        x[is_longer] = _fuse(x[is_longer], local, _part(audio, "patch_embed.fusion_model."))
    return layer_norm(x.flatten(2).transpose(1, 2), audio, "patch_embed.norm")


def _fuse(x: torch.Tensor, local: torch.Tensor, part: Weights) -> torch.Tensor:
    """Weigh two images `(clips, width, rows, columns)` by attentional feature fusion."""
    both = x + local
    scores = torch.zeros_like(both)
    for name, first, start in (("local_att", 0, both), ("global_att", 1, both.mean(dim=(2, 3), keepdim=True))):
        hidden = batch_norm(_conv(start, part, f"{name}.{first}"), part, f"{name}.{first + 1}").relu()
        scores = scores + batch_norm(_conv(hidden, part, f"{name}.{first + 3}"), part, f"{name}.{first + 4}")
    weight = scores.sigmoid()
    return 2 * x * weight + 2 * local * (1 - weight)


def _block(x: torch.Tensor, part: Weights, *, shifted: bool) -> torch.Tensor:
    """Apply a Swin block to `(clips, patches, width)`: attention within windows, every second block's shifted."""
    attention = _part(part, "attn.")
    table, window = attention["relative_position_bias_table"], _window(attention)
    side, heads = isqrt(x.shape[1]), table.shape[1]
    # An image of one window is neither cut nor shifted.
    shift = window // 2 if shifted and side > window else 0
    image = layer_norm(x, part, "norm1").unflatten(1, (side, side)).roll((-shift, -shift), dims=(1, 2))
    qkv = linear(_windows(image, window), attention, "qkv").unflatten(-1, (3, heads, -1))
    q, k, v = qkv.movedim(2, 0).transpose(2, 3)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores + table[attention["relative_position_index"].long()].movedim(2, 0)
    if shift:
        # What the roll brought together from opposite edges shall not attend to each other.
        lines = torch.arange(side)
        edges = (lines >= side - window).long() + (lines >= side - shift)
        regions = _windows((3 * edges[:, None] + edges)[None, :, :, None], window)
        scores = scores.unflatten(0, (len(x), -1))
        scores = (scores - 100.0 * (regions != regions.transpose(1, 2))[:, None]).flatten(0, 1)
    attended = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    cut = linear(attended, attention, "proj").unflatten(1, (window, window))
    cut = cut.unflatten(0, (len(x), side // window, side // window))
    image = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift, shift), dims=(1, 2))
    x = x + image.flatten(1, 2)
    return x + linear(F.gelu(linear(layer_norm(x, part, "norm2"), part, "mlp.fc1")), part, "mlp.fc2")


def _window(attention: Weights) -> int:
    return (isqrt(len(attention["relative_position_bias_table"])) + 1) // 2


def _windows(image: torch.Tensor, window: int) -> torch.Tensor:
    """Cut `(clips, side, side, width)` into `(clips * windows, window * window, width)`."""
    cut = image.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return cut.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _merge(x: torch.Tensor, layers: Weights) -> torch.Tensor:
    side = isqrt(x.shape[1])
    image = x.unflatten(1, (side, side))
    corners = [image[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    merged = layer_norm(torch.cat(corners, dim=-1).flatten(1, 2), layers, "downsample.norm")
    return linear(merged, layers, "downsample.reduction")


def _project(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    part = _part(weights, f"{name}.")
    return linear(linear(x, part, "0").relu(), part, "2")


def _part(weights: Weights, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights whose names start with `prefix`, by the rest of their names, in float64."""
    return {
        key.removeprefix(prefix): tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in weights.items()
        if key.startswith(prefix)
    }


def _conv(x: torch.Tensor, weights: Weights, name: str, stride: tuple[int, int] = (1, 1)) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride)
