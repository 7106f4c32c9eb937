"""Preprocessing of open_clip's models in parts of transformers, which are saved and loaded without open_clip."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, normalizers
from transformers import CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

# open_clip draws "random" in training alone.
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "random": Image.Resampling.BICUBIC,
}
# Of `string.punctuation` without the underscore, which becomes a blank before.
PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]"


def image_processor(preprocess: Mapping[str, Any]) -> CLIPImageProcessorPil:
    """Return the image processor that a `preprocess_cfg` of open_clip stands for.

    Of pictures whose resized side exceeds the crop by 3, 7, 11, ... pixels it crops one pixel off from where
    torchvision does, which rounds halves to even.

    Raises:
        ValueError: the preprocessing is none of the kinds `shortest` (resize and crop, square) and `squash`.
    """
    size = preprocess.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else (int(side) for side in size[-2:])
    mode, interpolation = preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic"
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise ValueError(
            f"Cannot prepare images of {height} x {width} pixels with resize_mode {mode!r}: expected 'squash', or "
            "'shortest' for squares. Use another model."
        )
    if interpolation not in INTERPOLATIONS or preprocess.get("mode", "RGB") != "RGB":
        raise ValueError(
            f"Cannot prepare {preprocess.get('mode', 'RGB')} images with the interpolation {interpolation!r}: "
            f"expected RGB and one of {list(INTERPOLATIONS)}. Use another model."
        )
    crop = {"height": height, "width": width}
    return CLIPImageProcessorPil(
        size={"shortest_edge": height} if mode == "shortest" else crop,
        crop_size=crop,
        do_center_crop=mode == "shortest",
        resample=INTERPOLATIONS[interpolation],
        image_mean=_channels(preprocess.get("mean"), OPENAI_CLIP_MEAN),
        image_std=_channels(preprocess.get("std"), OPENAI_CLIP_STD),
    )


def _channels(value: Any, default: list[float]) -> list[float]:
    if not value:
        return list(default)
    return [float(number) for number in value] if isinstance(value, (list, tuple)) else [float(value)] * 3


def clip_tokenizer(upstream: Any) -> CLIPTokenizer:
    """Return transformers' tokenizer with the vocabulary and length of an open_clip `SimpleTokenizer`.

    The ids are the same but for texts that upstream repairs first (ftfy: mojibake, curly quotes, ligatures, full-width
    letters; HTML entities), or that spell its special tokens.

    Raises:
        ValueError: the tokenizer cuts texts at random, or has special tokens or a cleaning of its own.
    """
    if upstream.reduction_fn is not None or upstream.clean_fn.__name__ != "_clean_lower":
        raise ValueError(
            "Expected a tokenizer of open_clip that lowers texts and cuts them at the end, got one with the cleaning "
            f"{upstream.clean_fn.__name__.removeprefix('_clean_')!r} or a reduction mask. Use another model."
        )
    if len(upstream.all_special_ids) != 2:
        raise ValueError(
            f"Expected a tokenizer of open_clip with two special tokens, got {len(upstream.all_special_ids)}. Use "
            "another model."
        )
    # OpenAI's names of the two, which are the last of the vocabulary.
    specials = {upstream.sot_token_id: "<|startoftext|>", upstream.eot_token_id: "<|endoftext|>"}
    vocabulary = {specials.get(number, token): number for token, number in upstream.encoder.items()}
    merges = sorted(upstream.bpe_ranks, key=upstream.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=upstream.context_length)


def hf_tokenizer(upstream: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer inside an open_clip `HFTokenizer`, with upstream's cleaning in it.

    The ids are the same but for texts that upstream repairs first, as for [`clip_tokenizer`].

    Raises:
        ValueError: the tokenizer has no fast form, or upstream changes its ids.
    """
    inner = upstream.tokenizer
    if upstream.tokenizer_mode or upstream.strip_sep_token or not getattr(inner, "is_fast", False):
        raise ValueError(
            f"Cannot use the tokenizer {type(inner).__name__} of this model: expected a fast one whose ids open_clip "
            "takes as they are, without tokenizer_mode and strip_sep_token. Use another model."
        )
    backend = Tokenizer.from_str(inner.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    cleaning = _cleaning(upstream.clean_fn.__name__.removeprefix("_clean_"))
    backend.normalizer = normalizers.Sequence([*cleaning, *([backend.normalizer] if backend.normalizer else [])])
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=upstream.context_length,
        **{name: copy.copy(token) for name in names if (token := getattr(inner, name, None)) is not None},
    )


def _cleaning(kind: str) -> list[normalizers.Normalizer]:
    """Return the steps of open_clip's cleaning, but for the repairs of ftfy and of HTML entities."""
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if kind == "whitespace":
        return spaces
    if kind == "lower":
        return [*spaces, normalizers.Lowercase()]
    if kind == "canonicalize":
        marks = [normalizers.Replace("_", " "), normalizers.Replace(Regex(PUNCTUATION), "")]
        return [*marks, normalizers.Lowercase(), *spaces]
    raise ValueError(f"Unknown cleaning {kind!r} of open_clip: expected whitespace, lower or canonicalize.")
