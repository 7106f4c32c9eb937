from __future__ import annotations

import numpy as np
import pytest

from cmcr_hf.demo.concepts import CONCEPTS
from cmcr_hf.demo.drawing import draw


def pixels(concept: str, seed: int, colour: str | None = None) -> np.ndarray:
    return np.asarray(draw(concept, np.random.default_rng(seed), colour=colour), dtype=float)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_a_picture_is_64_by_64_rgb_and_a_function_of_the_generator(concept: str) -> None:
    picture = draw(concept, np.random.default_rng(3))
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert np.array_equal(np.asarray(picture), pixels(concept, 3))
    assert not np.array_equal(np.asarray(picture), pixels(concept, 4))


def test_concepts_differ_in_the_same_random_stream() -> None:
    pictures = {draw(concept, np.random.default_rng(0)).tobytes() for concept in CONCEPTS}
    assert len(pictures) == len(CONCEPTS)


def test_the_asked_colour_is_the_one_of_the_body() -> None:
    red = np.mean([pixels("bell", seed, "red") for seed in range(20)], axis=0)
    blue = np.mean([pixels("bell", seed, "blue") for seed in range(20)], axis=0)
    middle = slice(24, 40)
    assert (red - blue)[middle, middle, 0].mean() > 50
    assert (blue - red)[middle, middle, 2].mean() > 50


def test_an_unknown_concept_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"'unicorn'.*windmill"):
        draw("unicorn", np.random.default_rng(0))


def test_an_unknown_colour_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"'infrared'.*red, orange"):
        draw("bell", np.random.default_rng(0), colour="infrared")
