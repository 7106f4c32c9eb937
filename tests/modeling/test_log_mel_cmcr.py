"""The log-mel in torch beside that of transformers, at the sizes of LAION's CLAP."""

import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor

from cmcr_hf.modeling.log_mel_cmcr import BAND, BLOCK, log_mel

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


@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
@pytest.mark.parametrize("kind", list(clips()))
def test_it_equals_that_of_the_extractor_to_a_hundred_thousandth_of_a_decibel(kind, truncation):
    extractor = ClapFeatureExtractor(truncation=truncation, frequency_min=50)
    clip = clips()[kind].astype(np.float32)
    filters = extractor.mel_filters if truncation == "fusion" else extractor.mel_filters_slaney
    expected = extractor._np_extract_fbank_features(clip, filters)
    found = log_mel(torch.from_numpy(clip), extractor)
    assert found.dtype == torch.float32
    # Where values reach 60 dB, the last bit of float32 is 4e-6.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, BLOCK, BLOCK + 1])
def test_a_frame_does_not_depend_on_how_many_there_are(frames):
    extractor = ClapFeatureExtractor(truncation="fusion")
    clip = torch.from_numpy(clips()["noise"].astype(np.float32))
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
    torch.testing.assert_close(after[:, BAND:], before[:, BAND:], rtol=0, atol=1e-5)
