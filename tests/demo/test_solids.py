from __future__ import annotations

import numpy as np
import pytest

from cmcr_hf.demo.meshes import ball
from cmcr_hf.demo.solids import KINDS, build, cloud_of, render, sample_cloud


def pixels(kind: str, seed: int, colour: str | None = None) -> np.ndarray:
    return np.asarray(render(kind, np.random.default_rng(seed), colour=colour), dtype=float)


def test_no_noun_names_two_kinds_and_a_kind_is_its_plain_noun() -> None:
    nouns = [noun for kind in KINDS.values() for noun in kind.nouns]
    assert len(KINDS) == 18 and len(nouns) == len(set(nouns)) == 54
    assert all(name == kind.nouns[0] for name, kind in KINDS.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_fills_the_unit_ball_and_has_proportions_of_its_own(kind: str) -> None:
    first, other = (build(kind, np.random.default_rng(seed)) for seed in (0, 1))
    assert np.linalg.norm(first.vertices, axis=1).max() == pytest.approx(1)
    assert first.faces.max() < len(first.vertices) and len(first.tones) == len(first.faces)
    same_layout = first.vertices.shape == other.vertices.shape
    assert not same_layout or np.abs(first.vertices - other.vertices).max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_cloud_is_float32_of_the_points_asked_for_and_a_function_of_the_generator(kind: str) -> None:
    cloud = sample_cloud(kind, np.random.default_rng(3))
    assert (cloud.shape, cloud.dtype) == ((512, 3), np.float32)
    assert np.array_equal(cloud, sample_cloud(kind, np.random.default_rng(3)))
    assert not np.array_equal(cloud, sample_cloud(kind, np.random.default_rng(4)))
    # 1.2 in radius, noise of 0.02 and an offset of 0.2 along each axis.
    assert 0.3 < np.linalg.norm(cloud, axis=1).max() < 1.2 + 0.35 + 6 * 0.02 * 1.2
    assert sample_cloud(kind, np.random.default_rng(3), points=7).shape == (7, 3)


def test_three_clouds_in_ten_lack_a_side() -> None:
    mesh, directions = ball(1.0), np.random.default_rng(0).normal(size=(100, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    def roundness(seed: int) -> float:
        extents = np.ptp(cloud_of(mesh, np.random.default_rng(seed), 2000) @ directions.T, axis=0)
        return extents.min() / extents.max()

    # A whole ball is as wide in every direction; a cut takes at least a tenth of the surface and so of the width.
    lacking = sum(roundness(seed) < 0.92 for seed in range(200))
    assert 40 < lacking < 80


def test_clouds_are_turned_about_the_vertical_by_any_angle_and_tilted_a_little() -> None:
    clouds = [sample_cloud("ladder", np.random.default_rng(seed)) for seed in range(40)]
    axes = [np.linalg.svd(cloud - cloud.mean(axis=0), full_matrices=False)[2] for cloud in clouds]
    upright = np.abs([rows[0, 1] for rows in axes])
    assert upright.min() > 0.75 and upright.std() > 0.01
    across = np.array([rows[1] for rows in axes])
    angles = np.arctan2(across[:, 2], across[:, 0]) % np.pi
    assert np.histogram(angles, bins=4, range=(0, np.pi))[0].min() > 2


def test_a_cloud_of_no_points_is_an_error() -> None:
    with pytest.raises(ValueError, match="points=0"):
        sample_cloud("ball", np.random.default_rng(0), points=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_64_by_64_rgb_and_a_function_of_the_generator(kind: str) -> None:
    picture = render(kind, np.random.default_rng(3))
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert np.array_equal(np.asarray(picture), pixels(kind, 3))
    assert not np.array_equal(np.asarray(picture), pixels(kind, 4))


def test_kinds_differ_in_the_same_random_stream() -> None:
    assert len({render(kind, np.random.default_rng(0)).tobytes() for kind in KINDS}) == len(KINDS)


def test_the_asked_colour_is_the_one_of_the_body() -> None:
    red = np.mean([pixels("box", seed, "red") for seed in range(20)], axis=0)
    blue = np.mean([pixels("box", seed, "blue") for seed in range(20)], axis=0)
    middle = slice(24, 40)
    assert (red - blue)[middle, middle, 0].mean() > 50
    assert (blue - red)[middle, middle, 2].mean() > 50


def test_an_unknown_kind_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"'unicorn'.*tree"):
        sample_cloud("unicorn", np.random.default_rng(0))


def test_an_unknown_colour_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"'infrared'.*red, orange"):
        render("ball", np.random.default_rng(0), colour="infrared")
