from __future__ import annotations

import numpy as np
import pytest

from cmcr_hf.demo.concepts import CONCEPTS
from cmcr_hf.demo.sounding_solids import BUILDERS, build, render, sample_cloud


def test_every_solid_is_of_a_concept_of_the_sounds_world() -> None:
    assert len(BUILDERS) == 12
    assert set(BUILDERS) < set(CONCEPTS)
    with pytest.raises(ValueError, match="No solid of 'rain'"):
        build("rain", np.random.default_rng(0))


@pytest.mark.parametrize("concept", BUILDERS)
def test_a_thing_fills_the_unit_ball_and_has_proportions_of_its_own(concept: str) -> None:
    first, other = (build(concept, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.linalg.norm(first.vertices, axis=1).max() == pytest.approx(1)
    assert first.faces.max() < len(first.vertices) and len(first.tones) == len(first.faces)
    same_layout = first.vertices.shape == other.vertices.shape
    assert not same_layout or np.abs(first.vertices - other.vertices).max() > 0.01


@pytest.mark.parametrize("concept", BUILDERS)
def test_a_cloud_and_a_picture_are_functions_of_the_generator(concept: str) -> None:
    cloud = sample_cloud(concept, np.random.default_rng(3))
    assert (cloud.shape, cloud.dtype) == ((512, 3), np.float32)
    assert np.array_equal(cloud, sample_cloud(concept, np.random.default_rng(3)))
    picture = np.asarray(render(concept, np.random.default_rng(3), "red"))
    assert picture.shape == (64, 64, 3)
    assert np.array_equal(picture, np.asarray(render(concept, np.random.default_rng(3), "red")))
