from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import ClapFeatureExtractor

from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.modeling_cmcr import CMCRModel
from cmcr_hf.modeling.processing_cmcr import CMCRProcessor
from tests.media import RATE, encode_audio, noise, peak_growth, picture

HOP = 64
FRAMES = RATE // HOP + 1
# Of noise, in which no frequency is much louder than others, a log-mel in float32 errs by this at most.
NOISE_DECIBELS = 1e-3


def fused_mel(processor: CMCRProcessor, waveform: np.ndarray) -> np.ndarray:
    """Return the log-mel of the whole clip, `(frames, bins)`."""
    extractor = processor.feature_extractor
    return extractor._np_extract_fbank_features(waveform, extractor.mel_filters)


def upstream_features(processor: CMCRProcessor, clip: np.ndarray) -> torch.Tensor:
    """Return what the extractor of transformers gives for a clip that it neither crops nor shrinks."""
    upstream = ClapFeatureExtractor.from_dict(processor.feature_extractor.to_dict())
    return upstream(clip, sampling_rate=RATE, return_tensors="pt")["input_features"]


def assert_decibels(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=NOISE_DECIBELS)


@pytest.mark.parametrize("samples", [1, 100, 3000, 7999, RATE])
@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_clips_within_the_window_equal_those_of_the_extractor(
    processor: CMCRProcessor, fused: CMCRProcessor, samples: int, mode: str
) -> None:
    prepare = fused if mode == "fused" else processor
    clip = noise(samples)
    inputs = prepare(audio=clip, sampling_rate=RATE)
    assert_decibels(inputs["input_features"], upstream_features(prepare, clip))
    assert inputs["is_longer"].tolist() == [[False]]


@pytest.mark.parametrize("samples", [RATE + 1, RATE + HOP - 1])
def test_a_fused_clip_less_than_a_hop_over_the_window_equals_that_of_the_extractor(
    fused: CMCRProcessor, samples: int
) -> None:
    clip = noise(samples)
    inputs = fused(audio=clip, sampling_rate=RATE)
    assert_decibels(inputs["input_features"], upstream_features(fused, clip))
    assert inputs["is_longer"].tolist() == [[False]]


# With 1, 2 and 3 hops over the window there are as few possible starts as thirds, or fewer.
@pytest.mark.parametrize(
    ("samples", "starts"),
    [
        (RATE + HOP, [0, 1, 0]),
        (RATE + 2 * HOP, [0, 1, 2]),
        (RATE + 3 * HOP, [0, 2, 3]),
        (20000, [31, 94, 156]),
        (600_001, [1541, 4625, 7709]),
    ],
)
def test_a_long_fused_clip_gives_its_whole_and_the_middle_of_each_third(
    fused: CMCRProcessor, samples: int, starts: list[int]
) -> None:
    clip = noise(samples)
    inputs = fused(audio=clip, sampling_rate=RATE)
    mel = torch.from_numpy(np.ascontiguousarray(fused_mel(fused, clip)))
    shrunk = torch.nn.functional.interpolate(mel[None, None], (FRAMES, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(inputs["input_features"][0, 0], shrunk[0, 0], rtol=0, atol=NOISE_DECIBELS)
    for channel, start in zip(inputs["input_features"][0, 1:], starts, strict=True):
        assert torch.allclose(channel, mel[start : start + FRAMES], rtol=0, atol=NOISE_DECIBELS)
    assert inputs["is_longer"].tolist() == [[True]]


def test_the_extractor_could_have_drawn_those_starts(fused: CMCRProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = noise(20000)
    monkeypatch.setattr(np.random, "choice", lambda starts: starts[(len(starts) - 1) // 2])
    # transformers shrinks to 64 bins, whatever their number; the chunks are the rest.
    theirs = []
    monkeypatch.setattr(np, "stack", lambda channels, axis: theirs.extend(channels) or np.zeros(1))
    fused.feature_extractor._random_mel_fusion(fused_mel(fused, clip), 20000 // HOP + 1, FRAMES)
    monkeypatch.undo()
    ours = fused(audio=clip, sampling_rate=RATE)["input_features"][0].numpy()
    assert all(np.allclose(ours[i], theirs[i], rtol=0, atol=NOISE_DECIBELS) for i in (1, 2, 3))


@pytest.mark.parametrize(("samples", "start"), [(RATE + 1, 0), (RATE + 2, 1), (20000, 6000)])
def test_a_long_unfused_clip_gives_the_window_in_its_middle(
    processor: CMCRProcessor, samples: int, start: int
) -> None:
    clip = noise(samples)
    inputs = processor(audio=clip, sampling_rate=RATE)
    middle = processor(audio=clip[start : start + RATE], sampling_rate=RATE)
    assert torch.equal(inputs["input_features"], middle["input_features"])
    assert inputs["is_longer"].tolist() == [[True]]


@pytest.mark.parametrize("mode", ["fused", "unfused"])
@pytest.mark.parametrize("rate", [RATE, 3000, 11025])
def test_a_long_clip_gives_the_same_from_path_bytes_and_array(
    processor: CMCRProcessor, fused: CMCRProcessor, tmp_path: Path, mode: str, rate: int
) -> None:
    prepare = fused if mode == "fused" else processor
    samples = noise(200_000, 2).T
    (tmp_path / "long.wav").write_bytes(encode_audio(samples, rate))
    expected = prepare(audio=samples, sampling_rate=rate)
    for form in (tmp_path / "long.wav", encode_audio(samples, rate)):
        assert torch.equal(prepare(audio=form)["input_features"], expected["input_features"])
    resampled = load_audio(samples, RATE, rate)
    assert torch.equal(prepare(audio=resampled, sampling_rate=RATE)["input_features"], expected["input_features"])


@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_samples_that_no_feature_depends_on_must_be_sound_too(
    processor: CMCRProcessor, fused: CMCRProcessor, mode: str
) -> None:
    clip = noise(600_000)
    clip[-1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        (fused if mode == "fused" else processor)(audio=clip, sampling_rate=RATE)


# Half a day of 48 kHz and the log-mel of that would take 8 GB and 1 GB.
LONG = """
import numpy as np
from transformers import ClapFeatureExtractor
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio
def run(truncation):
    samples = np.broadcast_to(np.float32(0.25), 12 * 3600 * 1000)
    features = extract_audio(samples, ClapFeatureExtractor(truncation=truncation), 1000)
    assert np.isfinite(features["input_features"]).all() and features["is_longer"][0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_the_memory_that_a_long_clip_takes_is_bounded(truncation: str) -> None:
    assert peak_growth(LONG, truncation) < 150e6


RECORDING = """
import numpy as np
from transformers import ClapFeatureExtractor
from cmcr_hf.modeling.feature_extraction_cmcr import extract_audio
def run(path):
    extract_audio(path, ClapFeatureExtractor())
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["FLAC", "WAV"])
def test_the_memory_that_a_long_recording_takes_is_bounded(tmp_path: Path, format: str) -> None:
    path = tmp_path / "long"
    with soundfile.SoundFile(path, "w", 44100, 2, "PCM_16", format=format) as file:
        for minute in range(30):
            file.write(noise(44100 * 60, 2, seed=minute % 3).T)
    # The file is 300 MB and its samples 635 MB.
    assert peak_growth(RECORDING, path) < 100e6


@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_an_item_is_bit_equal_alone_and_in_a_batch(processor: CMCRProcessor, fused: CMCRProcessor, mode: str) -> None:
    prepare = fused if mode == "fused" else processor
    clips = [noise(samples, seed=samples) for samples in (20000, 500, RATE, 9000)]
    images = [picture(20, 30), picture(64, 32), picture(32, 32), picture(1, 1)]
    batch = prepare(audio=clips, images=images, sampling_rate=RATE)
    for row, (clip, image) in enumerate(zip(clips, images, strict=True)):
        alone = prepare(audio=clip, images=image, sampling_rate=RATE)
        assert all(torch.equal(alone[name][0], batch[name][row]) for name in batch)


@pytest.mark.parametrize("mode", ["fused", "unfused"])
def test_preparing_twice_gives_the_same_whatever_was_drawn(
    processor: CMCRProcessor, fused: CMCRProcessor, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = fused if mode == "fused" else processor
    clips = [noise(20000), noise(500)]
    first = prepare(audio=clips, sampling_rate=RATE)
    state = np.random.get_state()
    try:
        for seed in range(3):
            np.random.seed(seed)
            again = prepare(audio=clips, sampling_rate=RATE)
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        np.random.set_state(state)


def test_is_longer_follows_from_the_clip_and_not_from_the_batch(fused: CMCRProcessor) -> None:
    clips = [noise(samples) for samples in (500, RATE, RATE + HOP - 1, RATE + HOP, 20000)]
    assert fused(audio=clips, sampling_rate=RATE)["is_longer"].tolist() == [[False]] * 3 + [[True]] * 2
    assert fused(audio=clips[:2], sampling_rate=RATE)["is_longer"].tolist() == [[False]] * 2


def test_length_is_measured_at_the_rate_of_the_extractor(fused: CMCRProcessor) -> None:
    assert fused(audio=noise(15000), sampling_rate=16000)["is_longer"].tolist() == [[False]]
    assert fused(audio=noise(15000), sampling_rate=RATE)["is_longer"].tolist() == [[True]]


def test_embeddings_of_a_fused_model_do_not_depend_on_the_batch(
    fused: CMCRProcessor, tiny_clip: Path, tiny_fused_clap: Path
) -> None:
    model = CMCRModel.from_sources_pretrained(
        clip=tiny_clip, clap=tiny_fused_clap, config={"projection_dim": 8}
    ).eval()
    clips = [noise(samples, seed=samples) for samples in (500, 20000, RATE, 9000, 3000)]
    with torch.no_grad():
        batch = model.get_audio_features(**fused(audio=clips, sampling_rate=RATE)).pooler_output
        short = model.get_audio_features(**fused(audio=clips[::2], sampling_rate=RATE)).pooler_output
        alone = [model.get_audio_features(**fused(audio=clip, sampling_rate=RATE)).pooler_output[0] for clip in clips]
    assert (batch - torch.stack(alone)).abs().max() < 1e-6
    assert (batch[::2] - short).abs().max() < 1e-6
    assert (batch[0] - batch[2]).abs().max() > 1e-4  # they are different clips


def test_arrays_come_back_as_asked_for(processor: CMCRProcessor) -> None:
    clip, image = noise(500), picture()
    inputs = processor(text="a dog", audio=clip, images=image, sampling_rate=RATE, return_tensors="np")
    assert {name: (value.dtype.name, value.shape) for name, value in inputs.items()} == {
        "input_ids": ("int64", (1, 4)),
        "attention_mask": ("int64", (1, 4)),
        "pixel_values": ("float32", (1, 3, 32, 32)),
        "input_features": ("float32", (1, 1, FRAMES, 16)),
        "is_longer": ("bool", (1, 1)),
    }
    assert set(processor.model_input_names) >= set(inputs)


def test_real_recordings_and_pictures_are_prepared_alike_from_path_and_bytes(
    shared: Path, processor: CMCRProcessor
) -> None:
    clip, image = shared / "official" / "BBQ.wav", shared / "official" / "BBQ.jpeg"
    from_path = processor(audio=clip, images=image)
    from_bytes = processor(audio=clip.read_bytes(), images=image.read_bytes())
    assert all(torch.equal(from_path[name], from_bytes[name]) for name in from_path)
    samples, rate = soundfile.read(clip, dtype="float32", always_2d=True)
    as_array = processor(audio=samples, sampling_rate=rate)
    assert torch.equal(as_array["input_features"], from_path["input_features"])
