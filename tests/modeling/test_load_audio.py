import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cmcr_hf.modeling.audio_loading_cmcr import load_audio, open_audio
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from tests.media import RATE, encode_audio, noise


class Decoder:
    """What `datasets` gives for a row of an Audio column: torchcodec's decoder, of which two attributes are used."""

    sample_rate = 4000

    def __init__(self, data: np.ndarray) -> None:
        self.data = torch.from_numpy(data)

    def get_all_samples(self) -> "Decoder":
        return self


@pytest.mark.parametrize(
    "form", ["path", "string", "bytes", "array", "tensor", "dict", "dict path", "dict bytes", "decoder"]
)
def test_every_form_of_a_clip_gives_the_same_waveform(tmp_path: Path, form: str) -> None:
    samples = noise(3000)
    path = tmp_path / "ton ü.wav"
    path.write_bytes(encode_audio(samples, 4000))
    forms: dict[str, Any] = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "array": samples,
        "tensor": torch.from_numpy(samples),
        "dict": {"array": samples, "sampling_rate": 4000, "path": "elsewhere.wav"},
        "dict path": {"bytes": None, "path": str(path)},
        "dict bytes": {"bytes": path.read_bytes(), "path": None},
        "decoder": Decoder(samples[None]),
    }
    rate = 4000 if form in ("array", "tensor") else None
    assert np.array_equal(load_audio(forms[form], RATE, rate), soxr.resample(samples, 4000, RATE, quality="HQ"))


def test_a_file_knows_its_rate_better_than_the_call() -> None:
    assert len(load_audio(encode_audio(noise(4000), 4000), RATE, rate=16000)) == 8000


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 22050, 44100, 48000, 96000, np.int64(16000), 16000.0])
def test_a_tone_of_any_rate_keeps_its_pitch_and_level(rate: Any) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(int(rate)) / float(rate)).astype(np.float32)
    waveform = load_audio(tone, RATE, rate)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - RATE) <= 1
    expected = np.sin(2 * np.pi * 1000 * np.arange(len(waveform)) / RATE)
    assert np.abs(waveform - expected)[400:-400].max() < 1e-3


def test_the_rate_of_a_torch_formatted_row_is_a_tensor() -> None:
    samples = noise(100)
    row = {"array": torch.from_numpy(samples), "sampling_rate": torch.tensor(RATE)}
    assert np.array_equal(load_audio(row, RATE), samples)


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "file"])
def test_channels_are_averaged_in_every_layout(channels: int, layout: str) -> None:
    samples = noise(300, channels)
    forms = {"channels first": samples, "channels last": samples.T, "file": encode_audio(samples.T)}
    assert np.allclose(load_audio(forms[layout], RATE, RATE), samples.mean(axis=0), atol=1e-7)


def test_a_stereo_array_is_one_clip(processor: CMCRProcessor) -> None:
    assert len(processor(audio=noise(300, 2), sampling_rate=RATE)["input_features"]) == 1


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", ">i2"])
def test_integers_are_scaled_by_the_range_of_their_type(dtype: str) -> None:
    limits = np.iinfo(np.dtype(dtype))
    middle = (int(limits.max) + int(limits.min) + 1) // 2
    quarter = (int(limits.max) - middle + 1) // 4
    samples = np.array([limits.min, middle - quarter, middle, middle + quarter, limits.max]).astype(dtype)
    expected = [-1, -0.25, 0, 0.25, 1 - 1 / (4 * quarter)]
    assert load_audio(samples, RATE, RATE) == pytest.approx(expected, abs=1e-6)
    if dtype != ">i2":
        assert load_audio(torch.from_numpy(samples), RATE, RATE) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double])
def test_floats_of_any_width_are_samples(convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    samples = torch.tensor([0.5, -0.25, 0.125])
    assert load_audio(convert(samples), RATE, RATE).tolist() == samples.tolist()


@pytest.mark.parametrize("order", [slice(None, None, -1), slice(None, None, 2)])
def test_strided_views_equal_their_copies(order: slice) -> None:
    samples = noise(400)[order]
    assert np.array_equal(load_audio(samples, RATE, 16000), load_audio(samples.copy(), RATE, 16000))


def test_an_array_is_left_as_it_was(processor: CMCRProcessor) -> None:
    samples = noise(300, 2)
    before = samples.copy()
    processor(audio=samples, sampling_rate=16000)
    assert np.array_equal(samples, before)


@pytest.mark.parametrize("rate", [RATE, 4000, 96000])
def test_a_clip_of_one_sample_is_a_clip(processor: CMCRProcessor, rate: int) -> None:
    features = processor(audio=np.array([0.5], np.float32), sampling_rate=rate)["input_features"]
    assert features.shape == (1, 1, 126, 16)
    assert torch.isfinite(features).all()


def test_a_wave_that_a_pipe_wrote_without_a_length_is_read() -> None:
    data = bytearray(encode_audio(noise(500), subtype="PCM_16"))
    for start in (4, data.index(b"data") + 4):
        data[start : start + 4] = b"\xff\xff\xff\xff"
    assert len(load_audio(bytes(data), RATE)) == 500


def test_a_header_that_declares_more_than_memory_holds_is_an_error() -> None:
    data = bytearray(encode_audio(noise(500), format="FLAC", subtype="PCM_16"))
    data[21] |= 0x0F  # the highest bits of the count of samples
    with pytest.raises(ValueError, match="Expected at most 24 hours of audio, the audio declares 2237"):
        load_audio(bytes(data), RATE)


def test_a_header_that_declares_more_than_the_file_holds_is_an_error() -> None:
    data = bytearray(encode_audio(noise(500), format="FLAC", subtype="PCM_16"))
    data[22] = 1  # 16 million samples
    with pytest.raises(ValueError, match="Cannot read the audio: it"):
        load_audio(bytes(data), RATE)


def test_a_flac_that_a_pipe_wrote_without_a_length_is_an_error() -> None:
    data = bytearray(encode_audio(noise(500), format="FLAC", subtype="PCM_16"))
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="write it anew if its header is wrong"):
        load_audio(bytes(data), RATE)


def test_more_than_24_hours_are_refused_before_they_are_read() -> None:
    silence = np.broadcast_to(np.float32(0), 100 * 24 * 3600 + 2)
    with open_audio(silence[1:-1], RATE, 100) as clip:
        assert clip.samples == RATE * 24 * 3600
    with pytest.raises(ValueError, match="Expected at most 24 hours of audio, the audio declares 24"):
        load_audio(silence, RATE, 100)


@pytest.mark.parametrize("rate", [RATE, 44100, 3000, 11025.5])
def test_parts_of_a_clip_are_the_same_samples_as_in_the_whole(rate: float) -> None:
    samples = noise(400_000)
    whole = load_audio(samples, RATE, rate)
    spans = [(0, 1), (1, 7), (500, 40_000), (len(whole) - 300, len(whole))]
    with open_audio(samples, RATE, rate) as clip:
        assert clip.samples == len(whole)
        parts = clip.read(spans)
    assert all(np.array_equal(part, whole[start:stop]) for part, (start, stop) in zip(parts, spans, strict=True))


@pytest.mark.parametrize("rate", [100, 3000, 8001, 44100, 96000, 655350, 10_000_000])
def test_a_clip_in_blocks_is_resampled_as_in_one_piece(rate: int) -> None:
    samples = noise(150_000)[: 1500 * rate]
    assert np.array_equal(load_audio(samples, RATE, rate), soxr.resample(samples, rate, RATE, quality="HQ"))


def test_many_channels_are_read_in_shorter_blocks() -> None:
    samples = noise(3000, 1000)
    assert np.allclose(load_audio(encode_audio(samples.T), RATE), samples.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "DOUBLE", 1e-7),
        ("WAV", "ULAW", 0.02),
        ("WAV", "ALAW", 0.02),
        ("WAV", "IMA_ADPCM", 0.3),
        ("AIFF", "PCM_16", 1e-4),
        ("AU", "ULAW", 0.02),
        ("CAF", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_every_format_keeps_its_samples(tmp_path: Path, format: str, subtype: str, tolerance: float) -> None:
    tone = (0.5 * np.sin(np.arange(RATE) / 20)).astype(np.float32)
    path = tmp_path / "named.txt"
    path.write_bytes(encode_audio(tone, format=format, subtype=subtype))
    waveform = load_audio(path, RATE)
    assert np.abs(waveform[1000:7000] - tone[1000:7000]).max() < tolerance
    assert np.array_equal(waveform, load_audio(path.read_bytes(), RATE))


def test_what_libsndfile_cannot_read_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"such as M4A .*ffmpeg -i IN OUT\.flac"):
        load_audio(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + bytes(1000), RATE)


def test_an_ogg_file_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    data = encode_audio(noise(10 * RATE), format="OGG", subtype="VORBIS")
    whole, cut = load_audio(data, RATE), load_audio(data[: len(data) // 2], RATE)
    assert RATE < len(cut) < len(whole) == 10 * RATE
    assert np.array_equal(cut[:RATE], whole[:RATE])


@pytest.mark.parametrize("value", [1e-40, 0.25], ids=["denormal", "offset"])
@pytest.mark.parametrize("rate", [RATE, 44100])
def test_constant_samples_stay_constant(value: float, rate: int) -> None:
    waveform = load_audio(np.full(20000, value, np.float32), RATE, rate)
    assert waveform[500:-500] == pytest.approx(np.full(len(waveform) - 1000, value), rel=1e-3, abs=1e-37)


@given(st.lists(st.floats(width=32), max_size=40), st.sampled_from([RATE, 3000, 44100]), st.integers(1, 3))
def test_any_floats_give_finite_samples_or_an_error(values: list[float], rate: int, channels: int) -> None:
    # The shorter axis holds the channels; it would mix different samples down.
    assume(channels == 1 or len(values) < 2 or len(values) > channels)
    samples = np.tile(np.array(values, np.float32), (channels, 1))
    try:
        waveform = load_audio(samples, RATE, rate)
    except ValueError as error:
        assert not values or not np.abs(values).max() < 1e10, error
    else:
        assert np.abs(values).max() < 1e10
        assert len(waveform) > 0
        assert np.isfinite(waveform).all()


def test_the_loudest_samples_that_are_taken_give_finite_features(fused: CMCRProcessor) -> None:
    features = fused(audio=np.full(20000, 9e9, np.float32), sampling_rate=RATE)["input_features"]
    assert torch.isfinite(features).all()


def test_samples_that_overflow_are_an_error_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for samples in (np.array([1e300, 0.0]), np.full((3, 2), 3e38, np.float32), np.array([[np.inf], [-np.inf]])):
            with pytest.raises(ValueError, match="infinity"):
                load_audio(samples, RATE, RATE)


@pytest.mark.parametrize(
    "audio",
    [
        None,
        np.array(["a"]),
        np.ones(5, bool),
        np.ones(5, complex),
        np.ones((2, 2, 2)),
        np.array([0.5, None]),
        torch.ones(1, 2, 3),
    ],
    ids=["none", "text", "bool", "complex", "three axes", "none among numbers", "batch"],
)
def test_audio_of_a_wrong_kind(processor: CMCRProcessor, audio: Any) -> None:
    with pytest.raises(ValueError, match="Expected audio as a path, bytes or numeric array"):
        processor(audio=[audio], sampling_rate=RATE)


def test_whole_numbers_without_a_range_are_refused(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="8, 16 or 32 bits, got int64"):
        processor(audio=np.array([100, -200]), sampling_rate=RATE)


@pytest.mark.parametrize("audio", [[0.1, 0.2], [1, 2]])
def test_a_list_of_numbers_is_no_batch(processor: CMCRProcessor, audio: list[float]) -> None:
    with pytest.raises(ValueError, match="got a list of numbers"):
        processor(audio=audio, sampling_rate=RATE)


def test_no_clips(processor: CMCRProcessor) -> None:
    with pytest.raises(ValueError, match="Expected at least one audio clip"):
        processor(audio=[], sampling_rate=RATE)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 2), (0, 0)])
def test_an_array_without_samples(processor: CMCRProcessor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the audio is empty"):
        processor(audio=np.zeros(shape, np.float32), sampling_rate=RATE)


@pytest.mark.parametrize("audio", [noise(10), torch.ones(10), {"array": noise(10)}], ids=["array", "tensor", "dict"])
def test_an_array_needs_a_rate(processor: CMCRProcessor, audio: Any) -> None:
    with pytest.raises(ValueError, match="Pass sampling_rate="):
        processor(audio=audio)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), True, np.True_, "8000", [8000], 1, 1e12])
def test_a_rate_that_is_none(processor: CMCRProcessor, rate: Any) -> None:
    with pytest.raises(ValueError, match="Expected a sampling rate from 100 to 10000000 Hz"):
        processor(audio=noise(10), sampling_rate=rate)
