# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor of C-MCR: text, images and audio of any rate, channel count and length, for every source of a model."""

import io
import os

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

    def __init__(
        self,
        image_processor,
        feature_extractor,
        tokenizer,
        clap_tokenizer,
        clip_padding="longest",
        clap_max_length=77,
    ):
        super().__init__(image_processor, feature_extractor, tokenizer, clap_tokenizer)
        if clip_padding not in ("longest", "max_length"):
            raise ValueError(f"Expected clip_padding to be 'longest' or 'max_length', got {clip_padding!r}.")
        self.clip_padding = clip_padding
        self.clap_max_length = clap_max_length

    @classmethod
    def from_sources_pretrained(cls, clip: str | os.PathLike, clap: str | os.PathLike, **kwargs) -> "CMCRProcessor":
        """Build the processor from the folders or Hub ids of the two sources.

        Args:
            clip: an image-text model's repository: image processor and tokenizer.
            clap: an audio-text model's repository: feature extractor and tokenizer.
            **kwargs: `cache_dir`, `token`, ... for every part.
        """
        clip_config = AutoConfig.from_pretrained(clip, **kwargs)
        return cls(
            # The PIL backend everywhere: torchvision's pixels differ, and so would the embeddings of two machines.
            AutoImageProcessor.from_pretrained(clip, backend="pil", **kwargs),
            AutoFeatureExtractor.from_pretrained(clap, **kwargs),
            _load_tokenizer(clip, **kwargs),
            _load_tokenizer(clap, **kwargs),
            clip_padding="max_length" if clip_config.model_type.startswith("siglip") else "longest",
        )

    def __call__(
        self,
        text: str | list[str] | None = None,
        images=None,
        audio=None,
        sampling_rate: int | None = None,
        space: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare any subset of modalities.

        Args:
            text: one text or a list.
            images: one image or a list: PIL, path, bytes, array or tensor (see [`load_image`]).
            audio: one clip or a list: path, bytes, array, tensor or a `datasets` dict (see [`load_audio`]). A list is a batch of
                clips; samples of one clip go in as an array.
            sampling_rate: rate in Hz of audio given as arrays or tensors, required for those.
            space: whose tokenizer prepares the text, `"clip"` (default) or `"clap"`; name the same space to the model.

        Returns:
            Those of `input_ids`, `attention_mask`, `pixel_values`, `input_features`, `is_longer` that belong to the inputs.

        Raises:
            ValueError: nothing was given, an input is unreadable, empty or not finite, or an array has no rate.
        """
        if text is None and images is None and audio is None:
            raise ValueError("Expected at least one of text, images and audio.")
        data: dict = {}
        if text is not None:
            data.update(self._prepare_text(text, space))
        if images is not None:
            items = list(images) if isinstance(images, (list, tuple)) else [images]
            if not items:
                raise ValueError("Expected at least one image, got an empty list.")
            data.update(self.image_processor([load_image(item) for item in items], return_tensors="np"))
        if audio is not None:
            clips = list(audio) if isinstance(audio, (list, tuple)) else [audio]
            if not clips:
                raise ValueError("Expected at least one audio clip, got an empty list.")
            if all(isinstance(clip, (int, float)) for clip in clips):
                raise ValueError("Expected audio samples as an array, got a list of numbers. Pass np.asarray(samples).")
            rate = self.feature_extractor.sampling_rate
            features = [self._extract(load_audio(clip, rate, sampling_rate)) for clip in clips]
            data.update({name: np.stack([feature[name] for feature in features]) for name in features[0]})
        return BatchFeature(data, tensor_type=return_tensors)

    def _prepare_text(self, text: str | list[str], space: str | None) -> dict:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(item, str) for item in texts):
            raise ValueError("Expected text as a string or a non-empty list of strings.")
        if space in (None, "clip"):
            return self.tokenizer(texts, padding=self.clip_padding, truncation=True, return_tensors="np")
        if space == "clap":
            length = min(self.clap_max_length, self.clap_tokenizer.model_max_length)
            return self.clap_tokenizer(texts, padding="longest", truncation=True, max_length=length, return_tensors="np")
        raise ValueError(f"Expected space='clip' or space='clap' for text, got {space!r}.")

    def _extract(self, waveform: np.ndarray) -> dict[str, np.ndarray]:
        """Return the features of one mono clip at the extractor's rate, without its batch axis.

        [`ClapFeatureExtractor`] draws crops at random, and calls a random clip of the batch longer than it is. Here a clip over
        the window gives, in fused mode, its shrunken whole and the chunk in the middle of each third of the possible starts
        (where the extractor draws one), else the window in its middle; `is_longer` follows from the clip alone.
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
        mel = extractor(waveform, sampling_rate=rate, max_length=max(window, len(waveform)), return_tensors="np")["input_features"][0]
        frames = window // extractor.hop_length + 1
        if mel.shape[1] > frames:
            mel, longer = _fuse(mel[0], frames), True
        return {"input_features": mel.astype(np.float32), "is_longer": np.array([longer])}

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, *self.feature_extractor.model_input_names]


def _fuse(mel: np.ndarray, frames: int) -> np.ndarray:
    """Return the four channels of a fused CLAP, `(4, frames, bins)`, for the log-mel `(total, bins)` of a long clip."""
    # The extractor splits the possible starts like this and draws one of each third.
    thirds = np.array_split(np.arange(len(mel) - frames + 1), 3)
    starts = [third[(len(third) - 1) // 2] if len(third) else 0 for third in thirds]
    # Without antialiasing, as transformers shrinks it.
    whole = torch.from_numpy(np.ascontiguousarray(mel))[None, None]
    shrunk = torch.nn.functional.interpolate(whole, size=(frames, mel.shape[1]), mode="bilinear", align_corners=False)
    return np.stack([shrunk[0, 0].numpy(), *(mel[start : start + frames] for start in starts)])


def _load_tokenizer(source: str | os.PathLike, **kwargs):
    tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # Offline, transformers makes a tokenizer without a vocabulary instead of an error.
        raise ValueError(f"The tokenizer of {os.fspath(source)!r} is empty: its vocabulary file is missing. Download the repository whole.")
    return tokenizer


def load_image(image):
    """Read an image as RGB: a PIL image, path, encoded bytes, `datasets` dict, or an array or tensor.

    Arrays and tensors are `(height, width)`, `(height, width, 3)` or `(3, height, width)`, uint8 in 0..255 or floats in 0..1.
    The orientation that a camera recorded (EXIF) is applied.

    Raises:
        ValueError: the file is missing, damaged or no image; the array has another shape or range.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("Images need pillow: pip install pillow") from error
    if isinstance(image, dict) and ("bytes" in image or "path" in image):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    name = "the image"
    if isinstance(image, (str, os.PathLike)):
        name, image = f"image {os.fspath(image)!r}", _read_file(image, "image")
    if isinstance(image, (bytes, bytearray)):
        try:
            image = Image.open(io.BytesIO(image))
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"Cannot read {name}: it is damaged or in an unknown format ({error}).") from error
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    return Image.fromarray(_pixels(image))


def _pixels(image) -> np.ndarray:
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"Expected an image as (height, width, 3), (3, height, width) or (height, width), got shape {array.shape}.")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError(f"Expected image values as uint8 in 0..255 or floats in 0..1, got {array.dtype}.")
        array = np.rint(array * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def load_audio(audio, sampling_rate: int, rate: int | None = None) -> np.ndarray:
    """Read audio as a mono float32 waveform `(samples,)` at `sampling_rate` Hz.

    Args:
        audio: path, encoded bytes, `datasets` dict (`array` and `sampling_rate`, or `bytes`/`path`), a decoder with
            `get_all_samples()`, or an array or tensor: `(samples,)`, or two-dimensional with the channels on the shorter axis.
            Integers are scaled by their type's range.
        sampling_rate: rate of the result in Hz; soxr resamples in its high quality.
        rate: rate in Hz of an array or tensor.

    Raises:
        ValueError: the file is missing, damaged, empty or in an unknown format; samples are not finite; an array has no rate.
    """
    name = "the audio"
    if isinstance(audio, dict):
        if audio.get("array") is not None:
            rate, audio = audio.get("sampling_rate", rate), audio["array"]
        elif audio.get("bytes") is not None:
            audio = audio["bytes"]
        elif audio.get("path") is not None:
            audio = audio["path"]
        else:
            raise ValueError(f"Expected an audio dict with array, bytes or path, got the keys {list(audio)}.")
    elif hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` gives for an Audio column
        samples = audio.get_all_samples()
        rate, audio = samples.sample_rate, samples.data
    if isinstance(audio, (str, os.PathLike)):
        name, audio = f"audio {os.fspath(audio)!r}", _read_file(audio, "audio")
    if isinstance(audio, (bytes, bytearray)):
        waveform, rate = _decode(bytes(audio), name)
    else:
        waveform = _samples(audio)
        if rate is None:
            raise ValueError("Audio given as an array has no sampling rate of its own. Pass sampling_rate= in Hz.")
    if isinstance(rate, bool) or not rate > 0:
        raise ValueError(f"Expected a positive sampling rate in Hz for {name}, got {rate}.")
    if len(waveform) == 0:
        raise ValueError(f"Expected at least one audio sample, {name} is empty.")
    if not np.isfinite(waveform).all():
        raise ValueError(f"Expected finite audio samples, {name} holds NaN or infinity.")
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
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"Cannot read {name}: it is damaged or in a format that libsndfile lacks ({error}). Convert it to WAV, FLAC, OGG or MP3."
        ) from error
    return _mix_down(samples), rate


def _samples(audio) -> np.ndarray:
    array = audio.detach().cpu().float().numpy() if isinstance(audio, torch.Tensor) and audio.is_floating_point() else np.asarray(audio)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise ValueError(
            f"Expected audio samples as a numeric array (samples,) or (channels, samples), got {array.dtype} of shape {array.shape}."
        )
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        middle = 0 if array.dtype.kind == "i" else (limits.max + 1) / 2
        array = (array.astype(np.float64) - middle) / (limits.max + 1 - middle)
    array = array.astype(np.float32, copy=False)
    if array.ndim == 1:
        return array
    return _mix_down(array.T if array.shape[0] < array.shape[1] else array)


def _mix_down(samples: np.ndarray) -> np.ndarray:
    """Return the mean of the channels of `(samples, channels)`."""
    # Adding column by column is many times faster than numpy's mean over a short last axis.
    total = samples[:, 0].copy() if samples.shape[1] else np.zeros(0, np.float32)
    for channel in range(1, samples.shape[1]):
        total += samples[:, channel]
    return total if samples.shape[1] < 2 else total / np.float32(samples.shape[1])


def _read_file(path: str | os.PathLike, kind: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"Cannot read {kind} {os.fspath(path)!r}: {error.strerror}. Check the path.") from error


__all__ = ["CMCRProcessor"]
