"""The log-mel in torch beside that of transformers, at the sizes of LAION's CLAP."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as configured
from hypothesis import strategies as st
from transformers import ClapAudioConfig, ClapAudioModelWithProjection, ClapFeatureExtractor

from cmcr_hf.modeling.audio_loading_cmcr import load_audio
from cmcr_hf.modeling.log_mel_cmcr import BAND, BLOCK, TOLERANCE, log_mel

RATE = 48_000


def clips():
    """A noise that fades, a chirp, a pure tone, silence with a click, and near silence."""
    time = np.arange(2 * RATE) / RATE
    generator = np.random.default_rng(0)
    click = np.zeros(len(time))
    click[50_000] = 0.9
    return {
        "noise": generator.normal(0, 0.3, len(time)) * np.exp(-4 * time),
        "chirp": 0.6 * np.sin(2 * np.pi * (100 * time + 3000 * time**2)),
        "tone": 0.9 * np.sin(2 * np.pi * 440 * time),
        "click": click,
        "quiet": generator.normal(0, 1e-6, len(time)),
    }


def of_extractor(clip, extractor):
    filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
    return extractor._np_extract_fbank_features(clip, filters)


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("kind", list(clips()))
def test_in_float64_it_equals_that_of_the_extractor_to_a_hundred_thousandth_of_a_decibel(kind, truncation):
    extractor = ClapFeatureExtractor(truncation=truncation, frequency_min=50)
    clip = clips()[kind].astype(np.float32)
    found = log_mel(torch.from_numpy(clip), extractor, torch.float64)
    assert found.dtype == torch.float32
    # Where values reach 60 dB, the last bit of float32 is 4e-6.
    np.testing.assert_allclose(found.numpy(), of_extractor(clip, extractor), rtol=0, atol=1e-5)


def hard_clip(kind, amplitude, pitch, seed, samples=RATE // 4):
    """A clip for which float32 is hard, or easy, whatever its amplitude."""
    time = np.arange(samples) / RATE
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=samples)
    tone = np.sin(2 * np.pi * pitch * time + seed)
    fade = np.exp(-40 * time)
    if kind == "noise":
        clip = noise
    elif kind == "tone":
        clip = tone
    elif kind == "clipped":
        clip = np.clip(3 * tone, -1, 1)
    elif kind == "clicks":
        clip = np.where(generator.random(samples) < 2e-4, noise, 0)
    elif kind == "constant":
        clip = np.ones(samples)
    elif kind == "constant and noise":
        clip = 1 + 1e-4 * noise
    elif kind == "fading noise":
        clip = noise * fade
    elif kind == "fading tone":
        clip = tone * fade
    elif kind == "tone, then silence":
        clip = np.where(time < 0.1, tone, 0)
    elif kind == "16 bits":
        clip = np.round(2000 * tone) / 32768
    else:
        clip = np.cumsum(noise)
    return (amplitude * clip).astype(np.float32)


KINDS = ["noise", "tone", "clipped", "constant", "constant and noise", "16 bits", "rumble"]
KINDS += ["clicks", "fading noise", "fading tone", "tone, then silence"]
# A tone above half the rate less 400 Hz is mirrored into filters of a single frequency.
PITCHES = st.one_of(st.floats(20, 24_000), st.floats(23_600, 24_000))


def check_tolerance(kind, truncation, exponent, pitch, seed):
    extractor = ClapFeatureExtractor(truncation=truncation, frequency_min=50)
    clip = hard_clip(kind, 10**exponent, pitch, seed)
    found = log_mel(torch.from_numpy(clip), extractor).numpy()
    assert np.abs(found - of_extractor(clip, extractor)).max() <= TOLERANCE


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("kind", KINDS)
@given(exponent=st.floats(-4, 5), pitch=PITCHES, seed=st.integers(0, 1000))
@configured(max_examples=5)
def test_by_default_it_is_within_its_tolerance_of_the_extractor(kind, truncation, exponent, pitch, seed):
    check_tolerance(kind, truncation, exponent, pitch, seed)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("kind", KINDS)
@given(exponent=st.floats(-4, 5), pitch=PITCHES, seed=st.integers(0, 1000))
@configured(max_examples=200)
def test_by_default_it_is_within_its_tolerance_of_the_extractor_for_many_clips(
    kind, truncation, exponent, pitch, seed
):
    check_tolerance(kind, truncation, exponent, pitch, seed)


def recordings(shared: Path, count: int) -> list[np.ndarray]:
    with zipfile.ZipFile(shared / "data" / "audio" / "esc10_ogg_folds1235.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".ogg")]
        return [load_audio(archive.read(name), RATE) for name in names[:: len(names) // count]]


@pytest.mark.slow
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_of_recordings_it_is_within_its_tolerance_of_the_extractor(shared: Path, truncation: str) -> None:
    extractor = ClapFeatureExtractor(truncation=truncation, frequency_min=50)
    for clip in recordings(shared, 40):
        found = log_mel(torch.from_numpy(clip), extractor).numpy()
        assert np.abs(found - of_extractor(clip, extractor)).max() <= TOLERANCE


@pytest.mark.slow
def test_embeddings_do_not_depend_on_the_type_of_the_transform() -> None:
    extractor = ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50)
    torch.manual_seed(0)
    model = ClapAudioModelWithProjection(ClapAudioConfig()).eval()
    single, double = [], []
    for kind in KINDS:
        for amplitude in (1e-4, 0.5, 900):
            clip = torch.from_numpy(hard_clip(kind, amplitude, 440, 1, 10 * RATE))
            mels = torch.stack([log_mel(clip, extractor, dtype) for dtype in (torch.float32, torch.float64)])
            with torch.no_grad():
                embeds = model(mels[:, None], is_longer=torch.zeros(2, 1, dtype=torch.bool)).audio_embeds
            single.append(embeds[0].double())
            double.append(embeds[1].double())
    found, expected = torch.stack(single), torch.stack(double)
    assert torch.cosine_similarity(found, expected).min() >= 0.99999
    # The clips do differ.
    assert torch.cosine_similarity(expected[:, None], expected[None], dim=2).min() < 0.99


def test_a_frame_is_transformed_in_float64_by_what_it_holds_itself():
    extractor = ClapFeatureExtractor(truncation="fusion")
    tone, noise = (clips()[kind].astype(np.float32) for kind in ("tone", "noise"))
    half = len(tone) // 2
    mixed = torch.from_numpy(np.concatenate([noise[:half], tone[half:]]))
    found = log_mel(mixed, extractor)
    # Two frames at either side of the seam hold both.
    seam = half // extractor.hop_length
    assert torch.equal(found[: seam - 1], log_mel(torch.from_numpy(noise), extractor)[: seam - 1])
    assert torch.equal(found[seam + 2 :], log_mel(torch.from_numpy(tone), extractor)[seam + 2 :])


@pytest.mark.parametrize("frames", [1, BLOCK, BLOCK + 1])
def test_a_frame_does_not_depend_on_how_many_there_are(frames):
    extractor = ClapFeatureExtractor(truncation="fusion")
    clip = torch.from_numpy(np.tile(clips()["noise"].astype(np.float32), 2))
    whole = log_mel(clip, extractor)
    # Away from the end, which is reflected.
    part = log_mel(clip[: (frames + 2) * extractor.hop_length], extractor)[:frames]
    assert torch.equal(part, whole[:frames])


def test_filters_that_were_replaced_count_even_where_a_whole_band_of_them_is_empty():
    extractor = ClapFeatureExtractor(truncation="fusion")
    clip = torch.from_numpy(clips()["noise"].astype(np.float32))
    before = log_mel(clip, extractor)
    extractor.mel_filters = extractor.mel_filters.copy()
    extractor.mel_filters[:, :BAND] = 0
    after = log_mel(clip, extractor)
    assert (after[:, :BAND] == -100).all()
    torch.testing.assert_close(after[:, BAND:], before[:, BAND:], rtol=0, atol=TOLERANCE)
