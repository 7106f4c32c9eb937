from __future__ import annotations

import numpy as np
import pytest

from cmcr_hf.demo.concepts import CONCEPTS
from cmcr_hf.demo.synthesis import SAMPLING_RATE, synthesise


def power_share(concept: str, low: float, high: float) -> float:
    """Return the mean share of the power that lies between two frequencies in Hz."""
    shares = []
    for seed in range(8):
        spectrum = np.abs(np.fft.rfft(synthesise(concept, np.random.default_rng(seed)))) ** 2
        frequencies = np.arange(spectrum.size) * SAMPLING_RATE / 2 / (spectrum.size - 1)
        shares.append(spectrum[(frequencies >= low) & (frequencies < high)].sum() / spectrum.sum())
    return float(np.mean(shares))


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_sound_is_two_seconds_of_finite_samples_below_full_scale(concept: str) -> None:
    for seed in range(3):
        samples = synthesise(concept, np.random.default_rng(seed))
        assert (samples.shape, samples.dtype) == ((32000,), np.float32)
        assert 0.149 < np.abs(samples).max() < 0.951


def test_a_sound_is_a_function_of_the_generator() -> None:
    first = synthesise("bell", np.random.default_rng(1))
    assert np.array_equal(first, synthesise("bell", np.random.default_rng(1)))
    assert not np.array_equal(first, synthesise("bell", np.random.default_rng(2)))


def test_a_car_is_low_and_a_bird_is_high() -> None:
    assert power_share("car", 0, 800) > 0.8
    assert power_share("bird", 1500, 8000) > 0.8
    assert power_share("car", 1500, 8000) < 0.2


def test_a_clock_is_silent_between_ticks_and_rain_is_not() -> None:
    def quiet_share(concept: str) -> float:
        samples = synthesise(concept, np.random.default_rng(0))
        blocks = np.sqrt((samples.reshape(200, 160) ** 2).mean(axis=1))
        return float((blocks < 0.25 * blocks.max()).mean())

    assert quiet_share("clock") > 0.8
    assert quiet_share("rain") < 0.05


def test_an_unknown_concept_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'unicorn'"):
        synthesise("unicorn", np.random.default_rng(0))
