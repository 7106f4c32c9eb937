# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of C-MCR: text, images, audio and point clouds of any kind and size, for every source of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, ClapFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .clap_extraction_cmcr import CMCRFeatureExtractor
from .configuration_ulip import UlipConfig
from .feature_extraction_cmcr import extract_audio, extract_images
from .foreign_sources_cmcr import foreign_source
from .loading_cmcr import to_numpy
from .point_cloud_loading_cmcr import load_point_cloud

# No text has so many but one of blanks, and reading a book through would take a tokenizer seconds.
CHARACTERS_PER_TOKEN = 256


# What a source needs of the processor to embed a modality.
PARTS = {
    ("clip", "image"): "image_processor",
    ("clip", "text"): "tokenizer",
    ("clap", "audio"): "feature_extractor",
    ("clap", "text"): "clap_tokenizer",
    ("ulip", "image"): "ulip_image_processor",
    ("ulip", "text"): "ulip_tokenizer",
}


class CMCRProcessor(ProcessorMixin):
    """Prepare text, images, audio and point clouds for a [`CMCRModel`].

    Preprocessing is deterministic and per item: alone or in any batch, an item gives the same arrays. A part that no
    source of the model needs is `None`.

    Example:
        Images are prepared by the PIL backend of transformers, with the same pixels on every machine. A processor of
        its torchvision backend, set as an object, is given a batch at once, and its pixels stay on its device:

        ```python
        processor.image_processor = AutoImageProcessor.from_pretrained(repo, backend="torchvision", device="cuda")
        ```

    Args:
        image_processor: the CLIP source's.
        feature_extractor: the CLAP source's; audio is resampled to its `sampling_rate` (Hz) and mixed down to mono. A
            [`ClapFeatureExtractor`] becomes a [`CMCRFeatureExtractor`].
        tokenizer: the CLIP source's, which the default text space uses.
        clap_tokenizer: the CLAP source's.
        ulip_image_processor, ulip_tokenizer: the ULIP source's, where it has these towers.
        clip_padding: `"longest"`, or `"max_length"` for SigLIP, whose text tower reads the last position.
        clap_max_length: cut CLAP's texts to this many tokens. LAION-CLAP is trained and used with 77.
        point_channels: numbers a point that the ULIP source takes: 3 for xyz, 6 for xyz and rgb.
        min_points: of a cloud; as many as a group of the ULIP source has.
        max_points: of a larger cloud, so many points are drawn, and so many of a mesh's surface. ULIP-2 is used with
            10,000.
        normalize_point_clouds: move clouds to their centroid and scale the farthest point to 1. The official C-MCR
            takes clouds as they are; ModelNet40 is evaluated with normalised ones.
    """

    clap_tokenizer: Any
    ulip_image_processor: Any
    ulip_tokenizer: Any

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        clap_tokenizer: Any = None,
        ulip_image_processor: Any = None,
        ulip_tokenizer: Any = None,
        clip_padding: str = "longest",
        clap_max_length: int = 77,
        point_channels: int = 3,
        min_points: int = 1,
        max_points: int = 10_000,
        normalize_point_clouds: bool = False,
    ) -> None:
        if isinstance(feature_extractor, ClapFeatureExtractor):
            feature_extractor = CMCRFeatureExtractor.from_dict(feature_extractor.to_dict())
        super().__init__(
            image_processor, feature_extractor, tokenizer, clap_tokenizer, ulip_image_processor, ulip_tokenizer
        )
        if clip_padding not in ("longest", "max_length"):
            raise ValueError(f"Expected clip_padding to be 'longest' or 'max_length', got {clip_padding!r}.")
        self.clip_padding = clip_padding
        self.clap_max_length = clap_max_length
        self.point_channels = point_channels
        self.min_points = min_points
        self.max_points = max_points
        self.normalize_point_clouds = normalize_point_clouds

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Check the class of a part, where it is there (called by transformers at creation)."""
        if argument is not None:
            return super().check_argument_for_proper_class(argument_name, argument)
        return None

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> Any:
        """Return the class of a part by its name, of an image processor that of the PIL backend."""
        # transformers loads the second image processor by the name of its torchvision class.
        pil = getattr(transformers, f"{module_name}Pil", None) if module_name.endswith("ImageProcessor") else None
        return pil or ProcessorMixin.get_possibly_dynamic_module(module_name)

    def to_dict(self) -> dict[str, Any]:
        """Return what `processor_config.json` holds; a part that is not there is `None` in it, tokenizers too."""
        return super().to_dict() | {name: None for name in type(self).get_attributes() if getattr(self, name) is None}

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        stored = processor_dict or {}
        # A part that is there is an object or, a tokenizer, not mentioned.
        present = [name for name in cls.get_attributes() if stored.get(name, name) is not None]
        # The class that transformers takes the names of the parts from.
        parts: Any = type(cls.__name__, (cls,), {"get_attributes": classmethod(lambda _: present)})
        loaded = super(CMCRProcessor, parts)._get_arguments_from_pretrained(
            pretrained_model_name_or_path, processor_dict, **kwargs
        )
        found = dict(zip(present, loaded, strict=True))
        return [found.get(name) for name in cls.get_attributes()]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> CMCRProcessor:
        """Load a processor from the folder or Hub id that `save_pretrained` or `push_to_hub` wrote."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.image_processor is not None:
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
        return load_tokenizer(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save every part to a folder; the files do not depend on what was prepared before."""
        for tokenizer in (self.tokenizer, self.clap_tokenizer, self.ulip_tokenizer):
            if tokenizer is not None and tokenizer.is_fast:
                # A fast tokenizer saves the padding and truncation of its latest call, and sets both anew at each.
                tokenizer.backend_tokenizer.no_padding()
                tokenizer.backend_tokenizer.no_truncation()
        present = [name for name in type(self).get_attributes() if getattr(self, name) is not None]
        # transformers saves every part that the class names.
        self.get_attributes = lambda: present  # type: ignore[method-assign]
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.get_attributes

    @classmethod
    def from_sources_pretrained(
        cls,
        clip: str | os.PathLike | None = None,
        clap: str | os.PathLike | None = None,
        *,
        ulip: str | os.PathLike | None = None,
        revisions: dict[str, str | None] | None = None,
        **kwargs: Any,
    ) -> CMCRProcessor:
        """Build the processor from the folders or Hub ids of the sources.

        Args:
            clip: an image-text model's repository: image processor and tokenizer. Or one of open_clip,
                `open_clip:NAME/TAG`.
            clap: an audio-text model's repository: feature extractor and tokenizer. Or a LAION-CLAP file, `FILE.pt`.
            ulip: a [`UlipModel`]'s repository: image processor and tokenizer for the towers it has.
            revisions: `{space: revision}` of sources on the Hub.
            **kwargs: `cache_dir`, `token`, ... for every part.

        Raises:
            ValueError: a tokenizer's vocabulary is missing, or no source is given.
        """
        if clip is None and clap is None and ulip is None:
            raise ValueError("Expected the repository of at least one source. Pass clip=, clap= or ulip=.")
        # The main branch where none is named, as in every from_pretrained.
        clip_arguments, clap_arguments, ulip_arguments = (
            {**kwargs, **({"revision": revision} if revision else {})}
            for revision in ((revisions or {}).get(space) for space in ("clip", "clap", "ulip"))
        )
        parts: dict[str, Any] = {}
        if clip is not None and (foreign := foreign_source(clip)) is not None:
            parts |= foreign.load_parts(clip)
        elif clip is not None:
            _check_kind(clip, "clip", clip_arguments)
            clip_config = AutoConfig.from_pretrained(clip, **clip_arguments)
            tokenizer = load_tokenizer(clip, **clip_arguments)
            # SigLIP 2's tokenizer names no length: it would pad and cut nothing.
            positions = getattr(clip_config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
            parts["image_processor"] = _load_image_processor(clip, **clip_arguments)
            parts["tokenizer"] = tokenizer
            parts["clip_padding"] = "max_length" if clip_config.model_type.startswith("siglip") else "longest"
        if clap is not None and (foreign := foreign_source(clap)) is not None:
            parts |= foreign.load_parts(clap)
        elif clap is not None:
            parts["feature_extractor"] = AutoFeatureExtractor.from_pretrained(clap, **clap_arguments)
            parts["clap_tokenizer"] = load_tokenizer(clap, **clap_arguments)
        if ulip is not None:
            _check_kind(ulip, "ulip", ulip_arguments)
            ulip_config: Any = UlipConfig.from_pretrained(ulip, **ulip_arguments)
            parts["point_channels"] = ulip_config.point_config.input_channels
            parts["min_points"] = ulip_config.point_config.group_size
            # Given the configuration, the Auto classes do not ask whether to run the code beside it to read it.
            if ulip_config.vision_config is not None:
                parts["ulip_image_processor"] = _load_image_processor(ulip, config=ulip_config, **ulip_arguments)
            if ulip_config.text_config is not None:
                parts["ulip_tokenizer"] = load_tokenizer(ulip, config=ulip_config, **ulip_arguments)
        return cls(**parts)

    def __call__(
        self,
        text: str | Iterable[str] | None = None,
        images: Any = None,
        audio: Any = None,
        sampling_rate: float | None = None,
        space: str | None = None,
        point_clouds: Any = None,
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
            space: whose tokenizer and image processor prepare the text and the images, `"clip"` (default where it is
                there), `"clap"` or `"ulip"`; name the same space to the model.
            point_clouds: one cloud or a list: array or tensor `(points, channels)`, path, bytes or dict (see
                [`load_point_cloud`]).
            padding: of text: `True` as the source needs it, `"longest"` to the longest text given, `"max_length"` to
                the source's length. Images and audio have the fixed size of their source.
            truncation: of text, `True` alone: texts are always cut to the source's length.
            text_kwargs, images_kwargs, audio_kwargs, videos_kwargs, common_kwargs: the arguments above in the groups
                of `ProcessorMixin`, as sentence-transformers passes them; they come first. A padding of audio has no
                effect.

        Returns:
            Those of `input_ids`, `attention_mask`, `pixel_values`, `input_features` and `is_longer`, `point_clouds`
            (padded to the largest) and `num_points` of the inputs.

        Raises:
            ValueError: nothing was given, an input is unreadable, empty or not finite, an array has no rate, the
                source cannot take the padding or truncation, or the model has no source for a modality.
        """
        grouped = {name: value for name, value in (audio_kwargs or {}).items() if name != "padding"}
        for group in (text_kwargs, images_kwargs, videos_kwargs, common_kwargs):
            grouped.update(group or {})
        if grouped:
            own = {"sampling_rate": sampling_rate, "space": space, "return_tensors": return_tensors}
            own |= {"padding": padding, "truncation": truncation}
            return self(text, images, audio, **{"point_clouds": point_clouds, **own, **grouped})
        if text is None and images is None and audio is None and point_clouds is None:
            raise ValueError("Expected at least one of text, images, audio and point_clouds.")
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._prepare_text(text, space, padding, truncation))
        if images is not None:
            items = _as_list(images)
            if not items:
                raise ValueError("Expected at least one image, got an empty list.")
            # Texts of any space go with images of CLIP.
            image_processor = self._part("image", space if space == "ulip" else None)
            pixels = extract_images(items, image_processor)
            # Those of a torchvision processor are tensors, on its device.
            data.update(pixels if return_tensors == "pt" else {name: to_numpy(pixels[name]) for name in pixels})
        if audio is not None:
            clips = _as_list(audio)
            if not clips:
                raise ValueError("Expected at least one audio clip, got an empty list.")
            if all(isinstance(clip, (int, float)) for clip in clips):
                raise ValueError(
                    "Expected audio samples as an array, got a list of numbers. Pass np.asarray(samples)."
                )
            extractor = self._part("audio", None)
            data.update(_stack([extract_audio(clip, extractor, sampling_rate) for clip in clips]))
        if point_clouds is not None:
            data.update(self._prepare_point_clouds(point_clouds))
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare_text(
        self, text: str | Iterable[str], space: str | None, padding: bool | str, truncation: bool | str
    ) -> Mapping[str, Any]:
        tokenizer = self._part("text", space)
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
        if tokenizer is not self.tokenizer:
            length = tokenizer.model_max_length
            if tokenizer is self.clap_tokenizer:
                length = min(self.clap_max_length, length)
            padding = "longest" if padding is True else padding
            return _tokenize(tokenizer, texts, length, padding=padding, max_length=length)
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

    def _prepare_point_clouds(self, point_clouds: Any) -> dict[str, np.ndarray]:
        items = _as_list(point_clouds)
        if items and all(isinstance(item, (list, tuple, int, float)) for item in items):
            raise ValueError(
                "Expected point clouds as arrays, got lists of numbers. Pass np.asarray(points) for each."
            )
        if getattr(point_clouds, "ndim", 2) == 3:
            items = list(point_clouds)
        if not items:
            raise ValueError("Expected at least one point cloud, got none.")
        clouds = [
            load_point_cloud(
                item,
                channels=self.point_channels,
                min_points=self.min_points,
                max_points=self.max_points,
                normalize=self.normalize_point_clouds,
            )
            for item in items
        ]
        num_points = np.array([len(cloud) for cloud in clouds])
        padded = np.zeros((len(clouds), num_points.max(), self.point_channels), np.float32)
        for row, cloud in zip(padded, clouds, strict=True):
            row[: len(cloud)] = cloud
        return {"point_clouds": padded, "num_points": num_points}

    def _part(self, modality: str, space: str | None) -> Any:
        """Return the part that prepares a modality for a space, by default the first that can.

        Raises:
            ValueError: no source of this processor, or not the one asked for, has this modality.
        """
        able = {
            name: part
            for (name, of), attribute in PARTS.items()
            if of == modality and (part := getattr(self, attribute)) is not None
        }
        if (space or next(iter(able), None)) not in able:
            asked = "" if space is None else f", got space={space!r}"
            raise ValueError(
                f"Expected a space that embeds {modality}, one of {list(able)}{asked}. Use the processor of a model "
                "with such a source."
            )
        return able[space] if space else next(iter(able.values()))

    @property
    def model_input_names(self) -> list[str]:
        parts = (self.tokenizer, self.image_processor, self.feature_extractor)
        return [name for part in parts if part is not None for name in part.model_input_names]


def _check_kind(source: str | os.PathLike, space: str, arguments: dict[str, Any]) -> None:
    """Check that a ULIP, and nothing else, is given as one; transformers takes any configuration for any other."""
    kind = UlipConfig.get_config_dict(source, **arguments)[0].get("model_type")
    if (kind == "ulip") != (space == "ulip"):
        raise ValueError(
            f"Expected {'a UlipModel' if space == 'ulip' else 'an image-text model'} as {space}=, got a {kind} in "
            f"{os.fspath(source)!r}. Pass the source of that role."
        )


def _load_image_processor(source: str | os.PathLike, **kwargs: Any) -> Any:
    # The PIL backend unless one of torchvision is given as an object: its pixels differ, and so would the embeddings
    # of two machines.
    return AutoImageProcessor.from_pretrained(source, **{**kwargs, "backend": "pil"})


def load_tokenizer(source: str | os.PathLike, **kwargs: Any) -> Any:
    """Load a tokenizer from a folder or the Hub; ValueError where its vocabulary is missing."""
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
