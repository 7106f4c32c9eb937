"""Layers in plain tensors, by upstream's names: what converted models are compared with where upstream is not there.

Nothing here is a module or knows of transformers, so that a mistake in a table of keys or in a configuration shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

Weights = Mapping[str, torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def linear(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(x: torch.Tensor, weights: Weights, name: str, eps: float = 1e-5) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def batch_norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Normalise `(rows, channels, ...)` with the running statistics."""
    statistics = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attention(qkv: torch.Tensor, heads: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attend over `(rows, tokens, 3 * width)`: queries, keys and values side by side; `mask` is added."""
    rows, tokens, width = qkv.shape
    query, key, value = qkv.view(rows, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(rows, tokens, width // 3)


def clip_block(
    x: torch.Tensor, weights: Weights, name: str, heads: int, activation: Activation, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a `ResidualAttentionBlock` of CLIP, open_clip and ULIP's text tower to `(rows, tokens, width)`."""
    qkv = F.linear(
        layer_norm(x, weights, f"{name}.ln_1"),
        weights[f"{name}.attn.in_proj_weight"],
        weights[f"{name}.attn.in_proj_bias"],
    )
    x = x + linear(attention(qkv, heads, mask), weights, f"{name}.attn.out_proj")
    hidden = activation(linear(layer_norm(x, weights, f"{name}.ln_2"), weights, f"{name}.mlp.c_fc"))
    return x + linear(hidden, weights, f"{name}.mlp.c_proj")


def clip_text(input_ids: torch.Tensor, weights: Weights, heads: int, activation: Activation) -> torch.Tensor:
    """Embed texts `(rows, tokens)` with CLIP's text transformer, pooled at the largest id: `(rows, width)`."""
    tokens = input_ids.shape[1]
    x = weights["token_embedding.weight"][input_ids] + weights["positional_embedding"][:tokens]
    mask = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)
    layer = 0
    while f"transformer.resblocks.{layer}.ln_1.weight" in weights:
        x = clip_block(x, weights, f"transformer.resblocks.{layer}", heads, activation, mask)
        layer += 1
    pooled = layer_norm(x, weights, "ln_final")[torch.arange(len(x)), input_ids.argmax(dim=-1)]
    return pooled @ weights["text_projection"]
