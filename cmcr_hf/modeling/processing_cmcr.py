# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of C-MCR: text, images and audio of any rate, channel count and length, for every source of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, ClapFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .clap_extraction_cmcr import CMCRFeatureExtractor
from .feature_extraction_cmcr import extract_audio, extract_image

# No text has so many but one of blanks, and reading a book through would take a tokenizer seconds.
CHARACTERS_PER_TOKEN = 256


class CMCRProcessor(ProcessorMixin):
    """Prepare text, images and audio for a [`CMCRModel`].

    Preprocessing is deterministic and per item: alone or in any batch, an item gives the same arrays.

    Args:
        image_processor: the CLIP source's.
        feature_extractor: the CLAP source's; audio is resampled to its `sampling_rate` (Hz) and mixed down to mono. A
            [`ClapFeatureExtractor`] becomes a [`CMCRFeatureExtractor`].
        tokenizer: the CLIP source's, which the default text space uses.
        clap_tokenizer: the CLAP source's.
        clip_padding: `"longest"`, or `"max_length"` for SigLIP, whose text tower reads the last position.
        clap_max_length: cut CLAP's texts to this many tokens. LAION-CLAP is trained and used with 77.
    """

    clap_tokenizer: Any

    def __init__(
        self,
        image_processor: Any,
        feature_extractor: Any,
        tokenizer: Any,
        clap_tokenizer: Any,
        clip_padding: str = "longest",
        clap_max_length: int = 77,
    ) -> None:
        if isinstance(feature_extractor, ClapFeatureExtractor):
            feature_extractor = CMCRFeatureExtractor.from_dict(feature_extractor.to_dict())
        super().__init__(image_processor, feature_extractor, tokenizer, clap_tokenizer)
        if clip_padding not in ("longest", "max_length"):
            raise ValueError(f"Expected clip_padding to be 'longest' or 'max_length', got {clip_padding!r}.")
        self.clip_padding = clip_padding
        self.clap_max_length = clap_max_length

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> CMCRProcessor:
        """Load a processor from the folder or Hub id that `save_pretrained` or `push_to_hub` wrote."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.image_processor = _load_image_processor(pretrained_model_name_or_path, **kwargs)
        return processor

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls,
        sub_processor_type: str,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str = "",
        **kwargs: Any,
    ) -> Any:
        # For a missing second tokenizer, transformers takes the first one, which is the other space's, and warns.
        if sub_processor_type != "tokenizer":
            subfolder = "/".join(part for part in (subfolder, sub_processor_type) if part)
            if os.path.isdir(pretrained_model_name_or_path) and not os.path.isdir(
                os.path.join(pretrained_model_name_or_path, subfolder)
            ):
                raise ValueError(
                    f"{os.fspath(pretrained_model_name_or_path)!r} has no folder {subfolder!r} with the tokenizer of "
                    "that space. Save the processor anew with CMCRProcessor.save_pretrained."
                )
        return _load_tokenizer(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save every part to a folder; the files do not depend on what was prepared before."""
        for tokenizer in (self.tokenizer, self.clap_tokenizer):
            if tokenizer.is_fast:
                # A fast tokenizer saves the padding and truncation of its latest call, and sets both anew at each.
                tokenizer.backend_tokenizer.no_padding()
                tokenizer.backend_tokenizer.no_truncation()
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_sources_pretrained(
        cls,
        clip: str | os.PathLike,
        clap: str | os.PathLike,
        *,
        revisions: dict[str, str | None] | None = None,
        **kwargs: Any,
    ) -> CMCRProcessor:
        """Build the processor from the folders or Hub ids of the two sources.

        Args:
            clip: an image-text model's repository: image processor and tokenizer.
            clap: an audio-text model's repository: feature extractor and tokenizer.
            revisions: `{space: revision}` of sources on the Hub.
            **kwargs: `cache_dir`, `token`, ... for every part.

        Raises:
            ValueError: a tokenizer's vocabulary is missing.
        """
        # The main branch where none is named, as in every from_pretrained.
        clip_arguments, clap_arguments = (
            {**kwargs, **({"revision": revision} if revision else {})}
            for revision in ((revisions or {}).get("clip"), (revisions or {}).get("clap"))
        )
        clip_config = AutoConfig.from_pretrained(clip, **clip_arguments)
        tokenizer = _load_tokenizer(clip, **clip_arguments)
        # SigLIP 2's tokenizer names no length: it would pad and cut nothing.
        positions = getattr(clip_config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        return cls(
            _load_image_processor(clip, **clip_arguments),
            AutoFeatureExtractor.from_pretrained(clap, **clap_arguments),
            tokenizer,
            _load_tokenizer(clap, **clap_arguments),
            clip_padding="max_length" if clip_config.model_type.startswith("siglip") else "longest",
        )

    def __call__(
        self,
        text: str | Iterable[str] | None = None,
        images: Any = None,
        audio: Any = None,
        sampling_rate: float | None = None,
        space: str | None = None,
        return_tensors: str = "pt",
        padding: bool | str = True,
        truncation: bool | str = True,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        audio_kwargs: Mapping[str, Any] | None = None,
        videos_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """Prepare any subset of modalities.

        Args:
            text: one text or a list. A special token that a text spells, such as `<|endoftext|>`, is a word like any.
            images: one image or a list: PIL, path, bytes, array or tensor (see [`load_image`]).
            audio: one clip or a list: path, bytes, array, tensor or a `datasets` dict (see [`load_audio`]). A list is
                a batch of clips; samples of one clip go in as an array.
            sampling_rate: rate in Hz of audio given as arrays or tensors, required for those.
            space: whose tokenizer prepares the text, `"clip"` (default) or `"clap"`; name the same space to the model.
            padding: of text: `True` as the source needs it, `"longest"` to the longest text given, `"max_length"` to
                the source's length. Images and audio have the fixed size of their source.
            truncation: of text, `True` alone: texts are always cut to the source's length.
            text_kwargs, images_kwargs, audio_kwargs, videos_kwargs, common_kwargs: the arguments above in the groups
                of `ProcessorMixin`, as sentence-transformers passes them; they come first. A padding of audio has no
                effect.

        Returns:
            Those of `input_ids`, `attention_mask`, `pixel_values`, `input_features` and `is_longer` of the inputs.

        Raises:
            ValueError: nothing was given, an input is unreadable, empty or not finite, an array has no rate, or the
                source cannot take the padding or truncation.
        """
        grouped = {name: value for name, value in (audio_kwargs or {}).items() if name != "padding"}
        for group in (text_kwargs, images_kwargs, videos_kwargs, common_kwargs):
            grouped.update(group or {})
        if grouped:
            own = {"sampling_rate": sampling_rate, "space": space, "return_tensors": return_tensors}
            own |= {"padding": padding, "truncation": truncation}
            return self(text, images, audio, **{**own, **grouped})
        if text is None and images is None and audio is None:
            raise ValueError("Expected at least one of text, images and audio.")
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._prepare_text(text, space, padding, truncation))
        if images is not None:
            items = _as_list(images)
            if not items:
                raise ValueError("Expected at least one image, got an empty list.")
            data.update(_stack([extract_image(item, self.image_processor) for item in items]))
        if audio is not None:
            clips = _as_list(audio)
            if not clips:
                raise ValueError("Expected at least one audio clip, got an empty list.")
            if all(isinstance(clip, (int, float)) for clip in clips):
                raise ValueError(
                    "Expected audio samples as an array, got a list of numbers. Pass np.asarray(samples)."
                )
            data.update(_stack([extract_audio(clip, self.feature_extractor, sampling_rate) for clip in clips]))
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare_text(
        self, text: str | Iterable[str], space: str | None, padding: bool | str, truncation: bool | str
    ) -> Mapping[str, Any]:
        if space not in (None, "clip", "clap"):
            raise ValueError(f"Expected space='clip' or space='clap' for text, got {space!r}.")
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
        if not texts or isinstance(text, (Mapping, Set)) or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"Expected text as a string or a non-empty list of strings, got {text!r:.80}.")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Expected text that UTF-8 can encode ({error}). Read it with errors='replace'."
            ) from error
        if truncation not in (True, "longest_first"):
            raise ValueError(f"Expected truncation=True, as longer texts exceed the source, got {truncation!r}.")
        if padding is not True and padding not in ("longest", "max_length"):
            raise ValueError(f"Expected padding=True, 'longest' or 'max_length', got {padding!r}.")
        if space == "clap":
            length = min(self.clap_max_length, self.clap_tokenizer.model_max_length)
            padding = "longest" if padding is True else padding
            return _tokenize(self.clap_tokenizer, texts, length, padding=padding, max_length=length)
        fixed = self.clip_padding == "max_length"
        if fixed and padding == "longest":
            raise ValueError(
                "Expected padding=True: the text tower reads the last position, so 'longest' misleads it."
            )
        padding = self.clip_padding if padding is True else padding
        # SigLIP is trained without a mask and attends to the padding.
        mask = False if fixed else None
        length = self.tokenizer.model_max_length
        return _tokenize(self.tokenizer, texts, length, padding=padding, return_attention_mask=mask)

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, *self.feature_extractor.model_input_names]


def _load_image_processor(source: str | os.PathLike, **kwargs: Any) -> Any:
    # The PIL backend everywhere: torchvision's pixels differ, and so would the embeddings of two machines.
    return AutoImageProcessor.from_pretrained(source, **{**kwargs, "backend": "pil"})


def _load_tokenizer(source: str | os.PathLike, **kwargs: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Offline, transformers makes a tokenizer without a vocabulary instead of an error.
        raise ValueError(
            f"The tokenizer of {os.fspath(source)!r} is empty: its vocabulary file is missing. "
            "Download the repository whole."
        )
    return tokenizer


def _tokenize(tokenizer: Any, texts: list[str], length: int, **options: Any) -> Mapping[str, Any]:
    """Tokenize texts of which the first `length` tokens count, with no special tokens but the tokenizer's own.

    Of each text, `CHARACTERS_PER_TOKEN` times `length` characters are read.
    """
    texts = [text[: CHARACTERS_PER_TOKEN * int(length)] for text in texts]
    # CLIP pools at the first end-of-text token, so a text that spells one would be cut off there.
    options |= {"split_special_tokens": True, "return_special_tokens_mask": True}
    inputs = tokenizer(texts, truncation=True, return_tensors="np", **options)
    own = inputs.pop("special_tokens_mask").astype(bool)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    spelled = (np.isin(inputs["input_ids"], list(special)) & ~own).any(axis=1)
    if spelled.any():
        # Some vocabularies (Unigram) hold them as words.
        raise ValueError(
            f"Expected text without any of {tokenizer.all_special_tokens}, got {texts[int(spelled.argmax())]!r:.80}. "
            "Remove it."
        )
    return inputs


def _stack(features: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([feature[name] for feature in features]) for name in features[0]}


def _as_list(value: Any) -> list[Any]:
    """Return the items of a list, tuple or `datasets` column, or the one item given."""
    many = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
    return list(value) if many else [value]


# Every saved folder carries the code, as that of the model does.
CMCRProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["CMCRProcessor"]
