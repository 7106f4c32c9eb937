# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of C-MCR: text, images and audio of any rate, channel count and length, for every source of a model."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, ClapFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class CMCRProcessor(ProcessorMixin):
    """Prepare text, images and audio for a [`CMCRModel`].

    Preprocessing is deterministic and per item: alone or in any batch, an item gives the same arrays.

    Args:
        image_processor: the CLIP source's.
        feature_extractor: the CLAP source's; audio is resampled to its `sampling_rate` (Hz) and mixed down to mono.
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
    ) -> BatchFeature:
        """Prepare any subset of modalities.

        Args:
            text: one text or a list.
            images: one image or a list: PIL, path, bytes, array or tensor (see [`load_image`]).
            audio: one clip or a list: path, bytes, array, tensor or a `datasets` dict (see [`load_audio`]). A list is
                a batch of clips; samples of one clip go in as an array.
            sampling_rate: rate in Hz of audio given as arrays or tensors, required for those.
            space: whose tokenizer prepares the text, `"clip"` (default) or `"clap"`; name the same space to the model.
            padding: of text: `True` as the source needs it, `"longest"` to the longest text given, `"max_length"` to
                the source's length. Images and audio have the fixed size of their source.
            truncation: of text, `True` alone: texts are always cut to the source's length.

        Returns:
            Those of `input_ids`, `attention_mask`, `pixel_values`, `input_features` and `is_longer` of the inputs.

        Raises:
            ValueError: nothing was given, an input is unreadable, empty or not finite, an array has no rate, or the
                source cannot take the padding or truncation.
        """
        if text is None and images is None and audio is None:
            raise ValueError("Expected at least one of text, images and audio.")
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._prepare_text(text, space, padding, truncation))
        if images is not None:
            items = _as_list(images)
            if not items:
                raise ValueError("Expected at least one image, got an empty list.")
            data.update(self.image_processor([load_image(item) for item in items], return_tensors="np"))
        if audio is not None:
            clips = _as_list(audio)
            if not clips:
                raise ValueError("Expected at least one audio clip, got an empty list.")
            if all(isinstance(clip, (int, float)) for clip in clips):
                raise ValueError(
                    "Expected audio samples as an array, got a list of numbers. Pass np.asarray(samples)."
                )
            rate = self.feature_extractor.sampling_rate
            features = [self._extract(load_audio(clip, rate, sampling_rate)) for clip in clips]
            data.update({name: np.stack([feature[name] for feature in features]) for name in features[0]})
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare_text(
        self, text: str | Iterable[str], space: str | None, padding: bool | str, truncation: bool | str
    ) -> Mapping[str, Any]:
        if space not in (None, "clip", "clap"):
            raise ValueError(f"Expected space='clip' or space='clap' for text, got {space!r}.")
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else []
        if not texts or isinstance(text, Mapping) or not all(isinstance(item, str) for item in texts):
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
            return self.clap_tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="np")
        fixed = self.clip_padding == "max_length"
        if fixed and padding == "longest":
            raise ValueError(
                "Expected padding=True: the text tower reads the last position, so 'longest' misleads it."
            )
        padding = self.clip_padding if padding is True else padding
        # SigLIP is trained without a mask and attends to the padding.
        mask = False if fixed else None
        return self.tokenizer(texts, padding=padding, truncation=True, return_attention_mask=mask, return_tensors="np")

    def _extract(self, waveform: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of one mono clip at the extractor's rate, without its batch axis.

        [`ClapFeatureExtractor`] draws crops at random, and calls a random clip of the batch longer than it is. Here a
        clip over the window gives, in fused mode, its shrunken whole and the chunk in the middle of each third of the
        possible starts (where the extractor draws one), else the window in its middle; `is_longer` follows from the
        clip alone.
        """
        extractor = self.feature_extractor
        rate = extractor.sampling_rate
        if not isinstance(extractor, ClapFeatureExtractor):
            features = extractor(waveform, sampling_rate=rate, return_tensors="np")
            return {name: value[0] for name, value in features.items()}
        window, longer = extractor.nb_max_samples, False
        if len(waveform) > window and extractor.truncation != "fusion":
            start = (len(waveform) - window) // 2
            waveform, longer = waveform[start : start + window], True
        # A window as long as the clip makes the extractor neither crop nor pad a long one.
        length = max(window, len(waveform))
        mel = extractor(waveform, sampling_rate=rate, max_length=length, return_tensors="np")["input_features"][0]
        frames = window // extractor.hop_length + 1
        if mel.shape[1] > frames:
            mel, longer = _fuse(mel[0], frames), True
        return {"input_features": mel.astype(np.float32), "is_longer": np.array([longer])}

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, *self.feature_extractor.model_input_names]


def _fuse(mel: np.ndarray, frames: int) -> np.ndarray:
    """Return the channels of a fused CLAP, `(4, frames, bins)`, for the log-mel `(total, bins)` of a long clip."""
    # The extractor splits the possible starts like this and draws one of each third.
    thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
    starts = [third[(len(third) - 1) // 2] if len(third) else 0 for third in thirds]
    # Without antialiasing, as transformers shrinks it.
    whole = torch.from_numpy(np.ascontiguousarray(mel))[None, None]
    shrunk = torch.nn.functional.interpolate(whole, size=(frames, mel.shape[1]), mode="bilinear", align_corners=False)
    return np.stack([shrunk[0, 0].numpy(), *(mel[start : start + frames] for start in starts)])


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


def _as_list(value: Any) -> list[Any]:
    """Return the items of a list, tuple or `datasets` column, or the one item given."""
    many = isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
    return list(value) if many else [value]


def _describe(value: Any) -> str:
    """Name the type of a value for an error message, and of an array also dtype and shape."""
    shape = f" of {value.dtype} and shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return type(value).__name__ + shape


def load_image(image: Any) -> Any:
    """Read an image as an RGB PIL image: a PIL image, path, encoded bytes, `datasets` dict, or an array or tensor.

    Arrays and tensors are `(height, width)`, `(height, width, 1 or 3)` or `(1 or 3, height, width)`, uint8 in 0..255
    or floats in 0..1; where both fit, channels come last in an array and first in a tensor. The orientation that a
    camera recorded (EXIF) is applied, transparency is dropped, 16 bits are cut to 8.

    Raises:
        ValueError: the file is missing, damaged or no image; the array has another shape or range.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("Images need pillow: pip install pillow") from error
    image, name = _open_item(image, "image")
    if not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
        return Image.fromarray(_pixels(image))
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))
        opened = ImageOps.exif_transpose(opened)
        if opened.mode.startswith("I;16"):
            # `convert` clips, so all but the darkest 16-bit greys would be white.
            return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
        if opened.mode not in ("I", "F"):
            return opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"Cannot read {name}: it is empty, no image, or in a format that pillow lacks.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {name}: it is damaged ({error}).") from error
    raise ValueError(
        f"Expected {name} with 8 or 16 bits a channel, got pillow's mode {opened.mode!r}. Convert it to 'L' or 'RGB'."
    )


def _pixels(image: Any) -> np.ndarray:
    array = _to_numpy(image)
    axes = (0, 2) if isinstance(image, torch.Tensor) else (2, 0)
    fits = [axis for axis in axes if array.ndim == 3 and array.shape[axis] in (1, 3)]
    if array.ndim == 2:
        array, fits = array[:, :, None], [2]
    if not fits or 0 in array.shape:
        raise ValueError(
            "Expected a PIL image, path, bytes or array (height, width), (height, width, 3) or (3, height, width), "
            f"got {_describe(image)}. Pass a batch as a list."
        )
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            span = f" from {array.min()} to {array.max()}" if array.dtype.kind in "fiu" else ""
            raise ValueError(f"Expected image values as uint8 in 0..255 or floats in 0..1, got {array.dtype}{span}.")
        array = np.rint(array * 255).astype(np.uint8)
    array = np.moveaxis(array, fits[0], 2)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


@np.errstate(over="ignore", invalid="ignore")  # what is not finite ends in an error, not in a warning
def load_audio(audio: Any, sampling_rate: int, rate: float | None = None) -> np.ndarray:
    """Read audio as a mono float32 waveform `(samples,)` at `sampling_rate` Hz.

    Args:
        audio: path, encoded bytes, `datasets` dict (`array` and `sampling_rate`, or `bytes`/`path`), a decoder with
            `get_all_samples()`, or an array or tensor: `(samples,)`, or two-dimensional with the channels on the
            shorter axis; floats in -1..1, or integers of 8, 16 or 32 bits, which their type's range scales.
        sampling_rate: rate of the result in Hz; soxr resamples in its high quality.
        rate: rate in Hz of an array or tensor, 100 to 10 million.

    Raises:
        ValueError: the file is missing, cut off, damaged, empty or in an unknown format; samples are not finite; an
            array has no rate.
    """
    if isinstance(audio, Mapping) and audio.get("array") is not None:
        name, rate, audio = "the audio", audio.get("sampling_rate", rate), audio["array"]
    elif hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` gives for an Audio column
        samples = audio.get_all_samples()
        name, rate, audio = "the audio", samples.sample_rate, samples.data
    else:
        audio, name = _open_item(audio, "audio")
    if isinstance(audio, (bytes, bytearray, memoryview)):
        waveform, rate = _decode(bytes(audio), name)
    else:
        waveform = _samples(audio)
        if rate is None:
            raise ValueError("Audio given as an array has no sampling rate of its own. Pass sampling_rate= in Hz.")
    rate = rate.item() if isinstance(rate, (np.ndarray, torch.Tensor)) and rate.ndim == 0 else rate
    # Within these bounds, soxr's time and memory stay in proportion to the clip.
    if not isinstance(rate, Real) or not 100 <= rate <= 10_000_000:
        raise ValueError(f"Expected a sampling rate from 100 to 10000000 Hz for {name}, got {rate!r}.")
    if len(waveform) == 0:
        raise ValueError(f"Expected at least one audio sample, {name} is empty.")
    # Beyond 1e10, the power of the spectrum overflows float32.
    if not np.abs(waveform).max() < 1e10:
        raise ValueError(f"Expected finite audio samples in -1..1, {name} holds NaN, infinity or numbers above 1e10.")
    if rate == sampling_rate:
        return waveform
    try:
        import soxr
    except ImportError as error:
        raise ImportError("Resampling needs soxr: pip install soxr") from error
    resampled = soxr.resample(waveform, rate, sampling_rate, quality="HQ").astype(np.float32, copy=False)
    # A clip of a sample or two can round to none at a lower rate; one sample of its mean keeps it defined.
    return resampled if len(resampled) else waveform.mean(keepdims=True)


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Audio files need soundfile: pip install soundfile") from error
    if not data:
        raise ValueError(f"Expected at least one audio sample, {name} is empty.")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, frames, log = file.samplerate, file.frames, file.extra_info
            waveforms = [np.zeros(0, np.float32)]
            # In blocks, as a damaged header can declare more than fits into memory.
            while len(block := file.read(65536, dtype="float32", always_2d=True)):
                waveforms.append(_mix_down(block))
            waveform = np.concatenate(waveforms)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"Cannot read {name}: it is damaged or in a format that libsndfile lacks ({error.error_string}). "
            "Convert it to WAV, FLAC, OGG or MP3."
        ) from error
    # libsndfile reads what is left of a file that was cut off, and leaves a line in its log.
    sizes = re.search(r"(?:data|SSND|Data Size) +: (\d+) \(should be (\d+)\)", log)
    declared, present = map(int, sizes.groups()) if sizes else (0, 0)
    # Writers into a pipe declare a size near 2 or 4 GiB, and some others count the header in.
    if len(waveform) < frames or (declared < 0x7FFF0000 and declared - present > 64):
        raise ValueError(f"Cannot read {name}: it ends before the length that it declares. Copy or download it again.")
    return waveform, rate


def _samples(audio: Any) -> np.ndarray:
    array = _to_numpy(audio)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise ValueError(
            "Expected audio as a path, bytes or numeric array (samples,) or (channels, samples), "
            f"got {_describe(audio)}."
        )
    if array.dtype in (np.int64, np.uint64):
        # What numpy makes of a list of whole numbers; scaled by 2^63 it would be silence.
        raise ValueError(f"Expected integer samples of 8, 16 or 32 bits, got {array.dtype}. Pass the file's own type.")
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        middle = 0 if array.dtype.kind == "i" else (limits.max + 1) / 2
        array = (array.astype(np.float64) - middle) / (limits.max + 1 - middle)
    array = array.astype(np.float32, copy=False)
    return array if array.ndim == 1 else _mix_down(array.T if array.shape[0] < array.shape[1] else array)


def _to_numpy(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    # numpy has no bfloat16.
    return (value.float() if value.is_floating_point() else value).numpy()


def _mix_down(samples: np.ndarray) -> np.ndarray:
    """Return the mean of the channels of `(samples, channels)`."""
    # Adding column by column is many times faster than numpy's mean over a short last axis.
    total = samples[:, 0].copy() if samples.shape[1] else np.zeros(0, np.float32)
    for channel in range(1, samples.shape[1]):
        total += samples[:, channel]
    return total if samples.shape[1] < 2 else total / np.float32(samples.shape[1])


def _open_item(item: Any, kind: str) -> tuple[Any, str]:
    """Return the bytes behind a path or `datasets` dict, or the item itself, and its name for error messages."""
    path = None
    if isinstance(item, Mapping):
        if item.get("bytes") is None and item.get("path") is None:
            raise ValueError(
                f"Expected the {kind} dict to hold an array (audio only), bytes or a path, got the keys {list(item)}."
            )
        path, item = item.get("path"), item["bytes"] if item.get("bytes") is not None else item["path"]
    if not isinstance(item, (str, os.PathLike)):
        path = path or getattr(item, "filename", None)
        return item, f"{kind} {str(path)!r}" if path else f"the {kind}"
    name = os.fspath(item)
    if re.match(r"[a-z][a-z0-9+.-]+://", str(name), re.IGNORECASE):
        raise ValueError(f"Expected the {kind} as a local file, got the URL {name!r}. Download it first.")
    try:
        with open(item, "rb") as file:
            return file.read(), f"{kind} {name!r}"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Cannot read {kind} {name!r}: {reason}. Check the path.") from error


__all__ = ["CMCRProcessor"]
