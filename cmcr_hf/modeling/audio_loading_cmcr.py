# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio of any rate, channel count and length as mono samples, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from .loading_cmcr import describe, open_item, to_numpy

MAX_HOURS = 24


def load_audio(audio: Any, sampling_rate: int, rate: float | None = None) -> np.ndarray:
    """Read audio as a mono float32 waveform `(samples,)` at `sampling_rate` Hz; see [`open_audio`]."""
    with open_audio(audio, sampling_rate, rate) as clip:
        return clip.read([(0, clip.samples)])[0]


@contextmanager
def open_audio(audio: Any, sampling_rate: int, rate: float | None = None) -> Iterator[AudioClip]:
    """Open audio to be read as a mono float32 waveform at `sampling_rate` Hz.

    Args:
        audio: path, encoded bytes, `datasets` dict (`array` and `sampling_rate`, or `bytes`/`path`), a decoder with
            `get_all_samples()`, or an array or tensor: `(samples,)`, or two-dimensional with the channels on the
            shorter axis; floats in -1..1, or integers of 8, 16 or 32 bits, which their type's range scales.
        sampling_rate: rate of the result in Hz; soxr resamples in its high quality.
        rate: rate in Hz of an array or tensor, 100 to 10 million.

    Raises:
        ValueError: the file is missing, cut off, damaged, empty or in an unknown format; the clip is longer than 24
            hours; an array has no rate. Samples that are damaged or not finite raise when they are read.
    """
    if isinstance(audio, Mapping) and audio.get("array") is not None:
        yield _array_clip(audio["array"], sampling_rate, audio.get("sampling_rate", rate))
    elif hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` gives for an Audio column
        samples = audio.get_all_samples()
        yield _array_clip(samples.data, sampling_rate, samples.sample_rate)
    else:
        with open_item(audio, "audio") as (stream, name):
            if stream is None:
                yield _array_clip(audio, sampling_rate, rate)
            else:
                with _open_file(stream, name) as file:
                    blocks = _file_blocks(file, name)
                    yield AudioClip(name, sampling_rate, file.samplerate, file.frames, file.channels, blocks)


@dataclass
class AudioClip:
    """A clip that is read once, block by block.

    Attributes:
        sampling_rate: of what [`AudioClip.read`] returns, in Hz.
        rate: of the source in Hz.
        frames: at `rate`.
        channels: of the source.
        blocks: given a number of frames, the source's samples in mono, at most so many at a time.
    """

    name: str
    sampling_rate: int
    rate: Any
    frames: int
    channels: int
    blocks: Callable[[int], Iterator[np.ndarray]]

    def __post_init__(self) -> None:
        scalar = isinstance(self.rate, (np.ndarray, torch.Tensor)) and self.rate.ndim == 0
        self.rate = self.rate.item() if scalar else self.rate
        # Within these bounds, soxr's time and memory stay in proportion to the clip.
        if not isinstance(self.rate, Real) or not 100 <= float(self.rate) <= 10_000_000:
            raise ValueError(
                f"Expected a sampling rate from 100 to 10000000 Hz for {self.name}, got {self.rate!r:.80}."
            )
        self.rate = float(self.rate)
        if self.frames == 0:
            raise ValueError(f"Expected at least one audio sample, {self.name} is empty.")
        hours = self.frames / self.rate / 3600
        if hours > MAX_HOURS:
            raise ValueError(
                f"Expected at most {MAX_HOURS} hours of audio, {self.name} declares {hours:.1f}. Cut it into clips, "
                "or write it anew if its header is wrong."
            )

    @property
    def samples(self) -> int:
        """The number of samples at `sampling_rate`, at least one."""
        # As soxr rounds it.
        return max(1, int(self.frames / (self.rate / self.sampling_rate) + 0.5))

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite ends in an error, not in a warning
    def read(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return the samples from start to stop of each span, the same ones as of the clip read whole.

        The clip is read to its end, but memory is taken for the spans alone.

        Args:
            spans: `(start, stop)` within `samples`, in order and without overlap.

        Raises:
            ValueError: the file is damaged or shorter than it declares; samples are not finite.
        """
        parts = [np.empty(stop - start, np.float32) for start, stop in spans]
        current = position = 0
        for block in self._resampled():
            end = position + len(block)
            for index in range(current, len(spans)):
                start, stop = spans[index]
                if start >= end:
                    break
                first, last = max(start, position), min(stop, end)
                parts[index][first - start : last - start] = block[first - position : last - position]
                current = index + (stop <= end)
            position = end
        if position != self.samples:
            raise RuntimeError(f"soxr gave {position} samples for {self.name}, expected {self.samples}.")
        return parts

    def _resampled(self) -> Iterator[np.ndarray]:
        ratio = self.rate / self.sampling_rate
        # A million samples a block, before resampling and after it.
        blocks = self._checked(max(1, min(65536, 2**20 // self.channels, int(2**20 * ratio))))
        if ratio == 1:
            yield from blocks
        elif self.frames / ratio < 0.5:
            # A sample or two can round to none at a lower rate; one sample of their mean keeps the clip defined.
            yield np.concatenate(list(blocks)).mean(keepdims=True)
        else:
            try:
                import soxr
            except ImportError as error:
                raise ImportError("Resampling needs soxr: pip install soxr") from error
            stream = soxr.ResampleStream(self.rate, self.sampling_rate, 1, dtype="float32", quality="HQ")
            position = 0
            for block in blocks:
                position += len(block)
                yield stream.resample_chunk(np.ascontiguousarray(block), last=position == self.frames)

    def _checked(self, size: int) -> Iterator[np.ndarray]:
        for block in self.blocks(size):
            # Beyond 1e10, the power of the spectrum overflows float32.
            if not (block.max() < 1e10 and block.min() > -1e10):
                raise ValueError(
                    f"Expected finite audio samples in -1..1, {self.name} holds NaN, infinity or numbers above 1e10."
                )
            yield block


def _array_clip(audio: Any, sampling_rate: int, rate: Any) -> AudioClip:
    array = to_numpy(audio)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise ValueError(
            "Expected audio as a path, bytes or numeric array (samples,) or (channels, samples), "
            f"got {describe(audio)}."
        )
    if array.dtype in (np.int64, np.uint64):
        # What numpy makes of a list of whole numbers; scaled by 2^63 it would be silence.
        raise ValueError(f"Expected integer samples of 8, 16 or 32 bits, got {array.dtype}. Pass the file's own type.")
    if rate is None:
        raise ValueError("Audio given as an array has no sampling rate of its own. Pass sampling_rate= in Hz.")
    if array.ndim == 1:
        array = array[:, None]
    elif array.shape[0] < array.shape[1]:
        array = array.T
    frames, channels = array.shape

    def blocks(size: int) -> Iterator[np.ndarray]:
        for start in range(0, frames, size):
            yield _mix_down(_scaled(array[start : start + size]))

    return AudioClip("the audio", sampling_rate, rate, frames if channels else 0, channels, blocks)


def _scaled(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        middle = 0 if array.dtype.kind == "i" else (limits.max + 1) / 2
        array = (array.astype(np.float64) - middle) / (limits.max + 1 - middle)
    return array.astype(np.float32, copy=False)


def _mix_down(samples: np.ndarray) -> np.ndarray:
    """Return the mean of the channels of `(samples, channels)`."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    # Adding column by column is many times faster than numpy's mean over a short last axis.
    total = samples[:, 0] + samples[:, 1]
    for channel in range(2, samples.shape[1]):
        total += samples[:, channel]
    total /= np.float32(samples.shape[1])
    return total


@contextmanager
def _open_file(stream: Any, name: str) -> Iterator[Any]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Audio files need soundfile: pip install soundfile") from error
    if not stream.seek(0, 2):
        raise ValueError(f"Expected at least one audio sample, {name} is empty.")
    stream.seek(0)
    try:
        with soundfile.SoundFile(stream) as file:
            # libsndfile reads what is left of a file that was cut off, and leaves a line in its log.
            sizes = re.search(r"(?:data|SSND|Data Size) +: (\d+) \(should be (\d+)\)", file.extra_info)
            declared, present = map(int, sizes.groups()) if sizes else (0, 0)
            # Writers into a pipe declare a size near 2 or 4 GiB, and some others count the header in.
            if declared < 0x7FFF0000 and declared - present > 64:
                raise _cut_off(name)
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"Cannot read {name}: it is damaged or in a format that libsndfile lacks, such as M4A "
            f"({error.error_string}). Convert it to WAV, FLAC, OGG or MP3, as by `ffmpeg -i IN OUT.flac`."
        ) from error


def _file_blocks(file: Any, name: str) -> Callable[[int], Iterator[np.ndarray]]:
    def blocks(size: int) -> Iterator[np.ndarray]:
        frames = 0
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            frames += len(block)
            yield _mix_down(block)
        if frames < file.frames:
            raise _cut_off(name)

    return blocks


def _cut_off(name: str) -> ValueError:
    return ValueError(f"Cannot read {name}: it ends before the length that it declares. Copy or download it again.")
