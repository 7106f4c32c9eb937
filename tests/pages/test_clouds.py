from __future__ import annotations

import numpy as np
import pytest

from cmcr_hf.pages.clouds import draw_cloud

RANDOM = np.random.default_rng(0).normal(size=(300, 3))


def inked(points: np.ndarray, side: int = 160) -> np.ndarray:
    """Return where the picture differs from its corner, which no cloud reaches."""
    pixels = np.asarray(draw_cloud(points, side), dtype=int)
    return np.abs(pixels - pixels[0, 0]).sum(axis=2) > 30


@pytest.mark.parametrize("count", [1, 2, 512, 10_000, 300_000])
def test_any_number_of_points_is_a_picture_of_the_side_asked_for(count: int) -> None:
    points = np.random.default_rng(1).uniform(-1, 1, (count, 3))
    picture = draw_cloud(points, side=96)
    assert (picture.mode, picture.size) == ("RGB", (96, 96))
    assert inked(points, 96).sum() > 5


def test_the_same_cloud_is_the_same_picture_whatever_its_place_size_and_type() -> None:
    expected = draw_cloud(RANDOM).tobytes()
    assert draw_cloud(RANDOM).tobytes() == expected
    # Powers of two, so that the arithmetic is exact.
    assert draw_cloud(RANDOM * 2.0**200).tobytes() == expected
    assert draw_cloud(RANDOM * 2.0**-200).tobytes() == expected
    whole = np.round(RANDOM * 64)
    assert draw_cloud(whole + 4096).tobytes() == draw_cloud(whole.astype(np.int32)).tobytes()
    assert draw_cloud(whole.astype(np.float16)).tobytes() == draw_cloud(whole).tobytes()


def test_columns_behind_the_coordinates_are_left_out() -> None:
    coloured = np.concatenate([RANDOM, np.random.default_rng(1).random((300, 3))], axis=1)
    assert draw_cloud(coloured).tobytes() == draw_cloud(RANDOM).tobytes()


def test_y_is_up_and_x_is_right() -> None:
    pole = np.stack([np.zeros(200), np.linspace(-1, 1, 200), np.zeros(200)], axis=1)
    # A knob at the end of each axis, so that the pole shows which end is which.
    knob = 0.1 * RANDOM / np.abs(RANDOM).max()
    top = inked(np.concatenate([pole, knob + np.array((0, 1, 0))]))
    rows, columns = np.nonzero(top)
    assert np.ptp(rows) > 2 * np.ptp(columns)
    assert top[:80].sum() > 1.2 * top[80:].sum()
    right = inked(np.concatenate([pole[:, [1, 0, 2]], knob + np.array((1, 0, 0))]))
    rows, columns = np.nonzero(right)
    assert np.ptp(columns) > 1.5 * np.ptp(rows)
    assert right[:, 80:].sum() > 1.2 * right[:, :80].sum()


def test_near_points_are_darker_than_far_ones() -> None:
    picture = np.asarray(draw_cloud(np.array([(0.0, 0.0, 1.0), (0.0, 0.0, -1.0)])), dtype=int).sum(axis=2)
    # Seen from above, what is near is below.
    assert picture[80:].min() < picture[:80].min() - 100


def test_the_whole_cloud_is_within_the_picture() -> None:
    for seed in range(20):
        cloud = np.random.default_rng(seed).normal(size=(50, 3)) * (1, 3, 0.2)
        ink = inked(cloud)
        assert not (ink[0].any() or ink[-1].any() or ink[:, 0].any() or ink[:, -1].any())


def test_points_at_one_place_are_a_dot_in_the_middle() -> None:
    rows, columns = np.nonzero(inked(np.full((9, 3), 5.0)))
    assert (rows.mean(), columns.mean()) == pytest.approx((79.5, 79.5), abs=1)


@pytest.mark.parametrize("shape", [(0, 3), (5, 2), (3,), (1, 5, 3)])
def test_another_shape_is_an_error_that_names_it(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got \(" + str(shape[0])):
        draw_cloud(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        draw_cloud(np.array([(0.0, 0.0, value)]))
