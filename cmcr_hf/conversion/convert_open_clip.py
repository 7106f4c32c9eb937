"""Read open_clip's CLIP with a ViT as transformers' CLIPModel, with its image processor and tokenizer.

Layout: `CLIP` of mlfoundations/open_clip (src/open_clip/model.py, MIT): a ViT behind `visual.`, and a causal text
transformer beside it, or behind `text.` as `CustomTextCLIP` has it.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from cmcr_hf.conversion.checkpoint import Checkpoint, convert_keys, count, load_weights, read_checkpoint, width
from cmcr_hf.sources.open_clip_names import ACTIVATIONS, CONFIG_NAME, named_config, read_config
from cmcr_hf.sources.open_clip_processing import clip_tokenizer
from cmcr_hf.sources.upstream import import_upstream

# Of a transformer behind `visual.` or not, and of what is around the two.
LAYER_KEYS = {
    r"attn\.in_proj_(weight|bias)": r"self_attn.{q,k,v}_proj.\2",
    r"attn\.out_proj\.(weight|bias)": r"self_attn.out_proj.\2",
    r"ln_1\.(weight|bias)": r"layer_norm1.\2",
    r"ln_2\.(weight|bias)": r"layer_norm2.\2",
    r"mlp\.c_fc\.(weight|bias)": r"mlp.fc1.\2",
    r"mlp\.c_proj\.(weight|bias)": r"mlp.fc2.\2",
}
KEYS: dict[str, str | None] = {
    **{
        rf"{before}transformer\.resblocks\.(\d+)\.{old}": rf"{after}_model.encoder.layers.\1.{new}"
        for before, after in ((r"visual\.", "vision"), ("", "text"))
        for old, new in LAYER_KEYS.items()
    },
    r"visual\.class_embedding": r"vision_model.embeddings.class_embedding",
    r"visual\.positional_embedding": r"vision_model.embeddings.position_embedding.weight",
    r"visual\.conv1\.weight": r"vision_model.embeddings.patch_embedding.weight",
    r"visual\.ln_pre\.(weight|bias)": r"vision_model.pre_layrnorm.\1",
    r"visual\.ln_post\.(weight|bias)": r"vision_model.post_layernorm.\1",
    r"visual\.proj": r"visual_projection.weight",
    r"token_embedding\.weight": r"text_model.embeddings.token_embedding.weight",
    r"positional_embedding": r"text_model.embeddings.position_embedding.weight",
    r"ln_final\.(weight|bias)": r"text_model.final_layer_norm.\1",
    r"text_projection": r"text_projection.weight",
    r"logit_scale": r"logit_scale",
    r"attn_mask": None,
}
UPSTREAM = (
    "open_clip's CLIP with a plain ViT (a model of another architecture is used as it is, as the source "
    "'open_clip:NAME/TAG')"
)
# The sizes in a model_cfg that weights show: open_clip's default, and the name in a configuration of transformers.
SIZES = {
    "vision_cfg": {
        "width": (768, "hidden_size"),
        "layers": (12, "num_hidden_layers"),
        "patch_size": (16, "patch_size"),
        "image_size": (224, "image_size"),
    },
    "text_cfg": {
        "width": (512, "hidden_size"),
        "layers": (12, "num_hidden_layers"),
        "vocab_size": (49408, "vocab_size"),
        "context_length": (77, "max_position_embeddings"),
    },
}
# What else a model_cfg may say without being another architecture, and what its weights do not show.
OTHERS = {"vision_cfg": {"head_width", "mlp_ratio", "patch_dropout"}, "text_cfg": {"heads", "mlp_ratio"}}
DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
# Heads are 64 wide, but in these ViTs: H-14 (1280), g-14, bigG-14 and e-14.
WIDE_HEADS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
TOKENIZER = "openai/clip-vit-base-patch32"
VOCABULARY = 49408
# A training checkpoint of the largest of the family (2.5 billion weights), its optimizer left out of account.
MAX_BYTES = 2**35


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an open_clip CLIP under the names of transformers' `CLIPModel`, in float32.

    Raises:
        ValueError: a key is none of this architecture, such as LayerScale, a pooling head or a ResNet; names it.
    """
    converted = convert_keys(plain_names(state_dict), KEYS, UPSTREAM)
    for name in ("visual_projection.weight", "text_projection.weight"):
        if name in converted and converted[name].ndim == 2:
            # Upstream multiplies from the right: features @ projection.
            converted[name] = converted[name].T.contiguous()
    if "logit_scale" in converted and converted["logit_scale"].numel() == 1:
        converted["logit_scale"] = converted["logit_scale"].reshape(())
    return converted


def plain_names(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the weights of a `CustomTextCLIP` by the names of `CLIP`, and others as they are."""
    if not any(key.startswith("text.") for key in weights):
        return weights
    plain = {key.removeprefix("text."): tensor for key, tensor in weights.items()}
    if len(plain) < len(weights):
        raise ValueError(f"Expected one text tower, got keys with and without 'text.'. Pass {UPSTREAM}.")
    return plain


def clip_config(
    weights: Mapping[str, torch.Tensor],
    *,
    activation: str,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> CLIPConfig:
    """Return the configuration of the `CLIPModel` that an open_clip CLIP becomes, from the shapes of its weights.

    Texts are pooled at the end-of-text token, which is the largest id: where open_clip pools.

    Args:
        activation: `gelu` or `quick_gelu`, which no weights show.
        vision_heads, text_heads: attention heads; those of open_clip's own models of this width where it is `None`.

    Raises:
        ValueError: a key is missing or misshapen, the image is not a square of patches, the activation is another, or
            the heads do not divide the width.
    """
    if activation not in ACTIVATIONS.values():
        raise ValueError(f"Expected the activation 'gelu' or 'quick_gelu', got {activation!r}.")
    weights = plain_names(weights)
    patches = width(weights, "visual.positional_embedding") - 1
    grid = math.isqrt(max(patches, 0))
    if grid < 1 or grid**2 != patches:
        raise ValueError(
            f"Expected the positions of a square of patches under 'visual.positional_embedding', got {patches}. Pass "
            f"{UPSTREAM}."
        )
    vision, text = (
        {
            "hidden_size": hidden_size,
            "intermediate_size": width(weights, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"),
            "num_hidden_layers": count(weights, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."),
            "num_attention_heads": _heads(hidden_size, heads, tower),
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
        }
        for prefix, tower, heads, hidden_size in (
            ("visual.", "vision", vision_heads, width(weights, "visual.conv1.weight")),
            ("", "text", text_heads, width(weights, "token_embedding.weight", 1)),
        )
    )
    patch_size, vocabulary = width(weights, "visual.conv1.weight", 2), width(weights, "token_embedding.weight")
    projection_dim = width(weights, "text_projection", 1)
    end = vocabulary - 1
    return CLIPConfig(
        vision_config={
            **vision,
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "num_channels": width(weights, "visual.conv1.weight", 1),
            "projection_dim": projection_dim,
        },
        text_config={
            **text,
            "vocab_size": vocabulary,
            "max_position_embeddings": width(weights, "positional_embedding"),
            "projection_dim": projection_dim,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        projection_dim=projection_dim,
    )


def _heads(hidden_size: int, heads: int | None, tower: str) -> int:
    by_width = hidden_size // (WIDE_HEADS.get(hidden_size, 64) if tower == "vision" else 64)
    heads = by_width if heads is None else heads
    if heads < 1 or hidden_size % heads:
        raise ValueError(
            f"Cannot tell the attention heads of a {tower} tower of width {hidden_size}. Put the model's "
            f"{CONFIG_NAME} beside its weights."
        )
    return heads


def read_clip(path: str | Path, *, activation: str | None = None) -> tuple[CLIPModel, Checkpoint]:
    """Read an open_clip CLIP: weights as a `.pt`, `.bin` or `.safetensors` file, or a checkpoint of its training.

    An `open_clip_config.json` beside the file, as the Hub's open_clip repositories have, tells activation and heads.

    Args:
        activation: `gelu` or `quick_gelu`, where there is no such file.

    Raises:
        ValueError: the file cannot be read or is another architecture, or the activation is not known; names the file
            or the key.
    """
    config = read_config(path)
    return _build(read_checkpoint(path, max_bytes=MAX_BYTES), config and config["model_cfg"], activation)


def read_named_clip(name: str, tag: str) -> tuple[CLIPModel, Checkpoint]:
    """Read the weights that open_clip knows by these names, downloaded to its cache where they are not there.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: as for [`named_config`] and [`read_clip`].
        OSError: the weights cannot be downloaded.
    """
    model = named_config(name, tag)["model_cfg"]
    open_clip = import_upstream("open_clip", "open-clip")
    path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
    return _build(read_checkpoint(path, max_bytes=MAX_BYTES), model, None)


def _build(
    checkpoint: Checkpoint, model: Mapping[str, Any] | None, activation: str | None
) -> tuple[CLIPModel, Checkpoint]:
    try:
        converted = convert_state_dict(checkpoint.weights)
        config = _config(checkpoint.weights, model, activation)
        # Sizes first: a layer of the file may stand for more than the file has.
        with torch.device("meta"):
            expected = sum(parameter.numel() for parameter in CLIPModel(config).parameters())
        if expected > sum(tensor.numel() for tensor in converted.values()):
            raise ValueError(f"the file lacks weights of what its shapes stand for. Pass {UPSTREAM}, whole.")
        with no_init_weights():
            clip = CLIPModel(config)
        load_weights(clip, converted, UPSTREAM)
    except ValueError as error:
        raise ValueError(f"Cannot convert {checkpoint.path}: {error}") from error
    return clip.eval(), checkpoint


def _config(
    weights: Mapping[str, torch.Tensor], model: Mapping[str, Any] | None, activation: str | None
) -> CLIPConfig:
    """Return the configuration by the model's own, where there is one, and by the shapes of its weights."""
    if model is None:
        if activation is None:
            raise ValueError(
                f"no weights show the activation. Put the model's {CONFIG_NAME} beside the file, or name the "
                "activation, gelu or quick_gelu."
            )
        tokens = width(plain_names(weights), "token_embedding.weight")
        if tokens != VOCABULARY:
            raise ValueError(
                f"its vocabulary of {tokens} is not CLIP's, which has {VOCABULARY}. Put the model's {CONFIG_NAME} "
                "beside the file."
            )
        return clip_config(weights, activation=activation)
    _check_architecture(model)
    quick_gelu = model.get("quick_gelu", False)
    if not isinstance(quick_gelu, bool):
        raise ValueError(
            f"its configuration has quick_gelu={quick_gelu!r:.80}, expected true or false. Put the model's own "
            f"{CONFIG_NAME} beside the weights."
        )
    known = ACTIVATIONS[quick_gelu]
    if activation not in (None, known):
        raise ValueError(f"its configuration has the activation {known!r}, got {activation!r}. Leave it out.")
    # Of one head each, which any width has, until it is known that the heads are this model's.
    config = clip_config(weights, activation=known, vision_heads=1, text_heads=1)
    vision_heads, text_heads = _checked_heads(model, config)
    return clip_config(weights, activation=known, vision_heads=vision_heads, text_heads=text_heads)


def _checked_heads(model: Mapping[str, Any], config: Any) -> tuple[int, int]:
    """Return the vision and text heads that a `model_cfg` tells, once its sizes are those that weights show.

    The heads alone are in no weights: the proof takes them from here too.

    Raises:
        ValueError: a size is no positive whole number or not that of the weights, or the heads do not divide the
            width; names it.
    """
    _check_size("embed_dim", model.get("embed_dim"), config.projection_dim)
    towers = {"vision_cfg": config.vision_config, "text_cfg": config.text_config}
    for part, tower in towers.items():
        for key, (default, name) in SIZES[part].items():
            _check_size(f"{part}.{key}", model[part].get(key, default), getattr(tower, name))
    for part, tower in towers.items():
        ratio, hidden_size = model[part].get("mlp_ratio", 4.0), tower.hidden_size
        # open_clip rounds the product down. A comparison with NaN is false.
        if type(ratio) not in (int, float) or not 0 <= hidden_size * ratio - tower.intermediate_size < 1:
            raise _another_model(f"{part}.mlp_ratio", ratio, tower.intermediate_size / hidden_size)
    vision, text = towers.values()
    head_width = _divisor("vision_cfg.head_width", model["vision_cfg"].get("head_width", 64), vision.hidden_size)
    return vision.hidden_size // head_width, _divisor(
        "text_cfg.heads", model["text_cfg"].get("heads", 8), text.hidden_size
    )


def _check_size(name: str, size: Any, shown: int) -> None:
    if _positive(name, size) != shown:
        raise _another_model(name, size, shown)


def _divisor(name: str, size: Any, hidden_size: int) -> int:
    if hidden_size % _positive(name, size):
        raise ValueError(
            f"its {CONFIG_NAME} has {name}={size}, expected a divisor of the width {hidden_size}. Put the model's own "
            "beside the weights."
        )
    return int(size)


def _positive(name: str, size: Any) -> int:
    if type(size) is not int or size < 1:
        raise ValueError(
            f"its {CONFIG_NAME} has {name}={size!r:.80}, expected a positive whole number. Put the model's own beside "
            "the weights."
        )
    return size


def _another_model(name: str, said: object, shown: object) -> ValueError:
    return ValueError(
        f"its {CONFIG_NAME} has {name}={said!r:.80}, its weights have {shown}: this configuration is of another "
        "model. Put the model's own beside the weights."
    )


def _check_architecture(model: Mapping[str, Any]) -> None:
    """Check that a `model_cfg` says nothing that weights do not show and `CLIPModel` does not do."""
    unknown = {
        f"{part}.{key}": value
        for part, sizes in SIZES.items()
        for key, value in model[part].items()
        if key not in sizes
        and key not in OTHERS[part]
        and value not in (None, False)
        and value not in DEFAULTS.get(key, ())
    }
    known = {"embed_dim", "quick_gelu", "custom_text", "init_logit_scale", *SIZES}
    unknown |= {key: value for key, value in model.items() if key not in known and value}
    if unknown:
        key, value = next(iter(unknown.items()))
        raise ValueError(f"Cannot convert a model with {key}={value!r:.80}: expected {UPSTREAM}.")


def tokenizer(source: str | None = None, *, vocab_size: int, context_length: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a converted model: CLIP's, from open_clip where it is installed, else from the Hub.

    Args:
        source: a folder or Hub id to take the tokenizer from instead.
        vocab_size, context_length: of the model; longer texts are cut to `context_length` tokens.

    Raises:
        ValueError: the tokenizer has another vocabulary than the model, or does not end a text with its last token,
            at which the model pools.
        OSError: there is no such folder or repository.
    """
    name = source or TOKENIZER
    found: PreTrainedTokenizerBase
    if source is None and importlib.util.find_spec("open_clip") is not None:
        found = clip_tokenizer(import_upstream("open_clip", "open-clip").SimpleTokenizer())
    else:
        found = AutoTokenizer.from_pretrained(name)
    # Offline, transformers makes a tokenizer without a vocabulary instead of an error.
    if len(found) != vocab_size:
        raise ValueError(
            f"The tokenizer {name!r} has {len(found)} tokens, the model knows {vocab_size}. Name a folder or Hub id "
            "that has the model's own as --tokenizer."
        )
    found.model_max_length = context_length
    ids = found("a")["input_ids"]
    if ids[-1:] != [vocab_size - 1]:
        raise ValueError(
            f"The tokenizer {name!r} ends texts with the token {ids[-1:]}, the model pools them at the last of its "
            f"vocabulary, {vocab_size - 1}. Name a folder or Hub id that has the model's own as --tokenizer."
        )
    return found


if __name__ == "__main__":
    from cmcr_hf.cli import main

    sys.exit(main(["convert", "open-clip", *sys.argv[1:]]))
