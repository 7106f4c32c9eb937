from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cmcr_hf.demo.meshes import Mesh, ball, box, extruded, joined, project, revolved, rotation, surface_points, tube

SQUARE = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]) / 2
TOWARDS_VIEWER = np.array((0.0, 0.0, 1.0))


def area(mesh: Mesh) -> float:
    corners = mesh.corners()
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(np.linalg.norm(normals, axis=1).sum() / 2)


def test_a_box_has_the_area_of_its_six_sides() -> None:
    assert area(box(1, 2, 3)) == pytest.approx(2 * (1 * 2 + 1 * 3 + 2 * 3))


def test_a_revolved_profile_has_the_area_of_its_surface() -> None:
    cylinder = revolved([(0, 0), (1, 0), (1, 2), (0, 2)], 200)
    assert area(cylinder) == pytest.approx(2 * np.pi * 1 * 2 + 2 * np.pi, rel=1e-3)
    assert area(ball(1.0)) == pytest.approx(4 * np.pi, rel=0.05)


def test_a_closed_tube_has_no_edge_of_its_own_and_an_open_one_has_two_rings_of_them() -> None:
    angles = np.arange(12) * np.pi / 6
    path = np.stack([np.cos(angles), 0 * angles, np.sin(angles)], axis=1)

    def edges(mesh: Mesh) -> list[int]:
        pairs = np.sort(mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        return list(Counter(map(tuple, pairs.tolist())).values())

    assert set(edges(tube(path, 0.2, closed=True))) == {2}
    assert edges(tube(path, 0.2)).count(1) == 2 * 8


def test_a_tube_keeps_its_radius_along_the_path() -> None:
    path = np.array([(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (2.0, 0.0, 0.0)])
    distances = np.linalg.norm(tube(path, 0.25).vertices[:, 1:], axis=1)
    assert distances == pytest.approx(0.25)


def test_turning_about_y_takes_z_to_x() -> None:
    assert rotation("y", np.pi / 2) @ (0, 0, 1) == pytest.approx(np.array((1, 0, 0)))
    assert box(1, 2, 3).turned("y", np.pi / 2).vertices.max(axis=0) == pytest.approx(np.array((1.5, 1, 0.5)))


def test_a_unit_mesh_is_centred_and_reaches_one() -> None:
    mesh = box(1, 2, 2).moved(5, 6, 7).unit()
    assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(1)
    assert mesh.vertices.max(axis=0) == pytest.approx(-mesh.vertices.min(axis=0))
    assert mesh.vertices[:, 1].max() == pytest.approx(2 * mesh.vertices[:, 0].max())


def test_joined_meshes_keep_their_triangles_and_tones() -> None:
    first, second = box(1, 1, 1), ball(0.5).toned(0.5)
    both = joined(first, second)
    assert np.array_equal(both.corners(), np.concatenate([first.corners(), second.corners()]))
    assert both.tones.sum() == len(first.faces) + len(second.faces) / 2


def test_points_lie_on_the_surface_and_a_side_has_as_many_as_its_area_asks_for() -> None:
    points = surface_points(box(1, 2, 4), 20_000, np.random.default_rng(0))
    assert points.shape == (20_000, 3)
    assert np.isclose(np.abs(points), (0.5, 1, 2)).any(axis=1).all()
    small = np.isclose(np.abs(points[:, 2]), 2).mean()
    assert small == pytest.approx(2 * 2 / area(box(1, 2, 4)), abs=0.01)


def test_the_nearer_face_is_seen_whatever_the_order() -> None:
    near, far = extruded(SQUARE, 0.01).moved(z=0.5).toned(0.25), extruded(2 * SQUARE, 0.01).moved(z=-0.5)
    for mesh in (joined(near, far), joined(far, near)):
        mask, brightness = project(mesh, 32, 12, (16, 16), TOWARDS_VIEWER, ambient=0.0)
        picture = np.zeros((32, 32))
        picture[mask] = brightness
        assert picture[16, 16] == pytest.approx(0.25)
        assert picture[16, 6] == pytest.approx(1.0)
        assert picture[0, 0] == 0


def test_a_ball_covers_the_disc_that_perspective_gives_it() -> None:
    mask, _ = project(ball(1.0), 128, 40, (64, 64), TOWARDS_VIEWER, ambient=0.0)
    radius = 40 * 4 * np.tan(np.arcsin(1 / 4))
    assert mask.sum() == pytest.approx(np.pi * radius**2, rel=0.04)
    rows, columns = np.nonzero(mask)
    assert (rows.mean(), columns.mean()) == pytest.approx((63.5, 63.5), abs=0.5)


def test_up_is_up_in_a_picture() -> None:
    mask, _ = project(box(0.2, 0.2, 0.2).moved(x=0.5, y=0.5), 64, 30, (32, 32), TOWARDS_VIEWER, ambient=0.0)
    rows, columns = np.nonzero(mask)
    assert rows.mean() < 20 and columns.mean() > 44


def test_shading_is_lambert_s_law_with_ambient_light_on_both_sides_of_a_face() -> None:
    facing = Mesh(np.array([(-1.0, -1, 0), (1, -1, 0), (0, 1, 0)]), np.array([(0, 1, 2)]), np.ones(1))
    away = Mesh(facing.vertices, np.array([(0, 2, 1)]), np.ones(1))
    for mesh in (facing, away):
        for angle, expected in ((0, 1.0), (np.pi / 3, 0.2 + 0.8 * 0.5), (np.pi, 0.2)):
            light = np.array((np.sin(angle), 0, np.cos(angle)))
            _, brightness = project(mesh, 16, 5, (8, 8), light, ambient=0.2)
            assert brightness == pytest.approx(expected)


def test_what_lies_outside_the_picture_is_left_out() -> None:
    mask, brightness = project(ball(1.0), 32, 40, (0, 0), TOWARDS_VIEWER, ambient=0.5)
    assert mask[0, 0] and mask.sum() == len(brightness) == 32 * 32 - (~mask).sum()
    outside, _ = project(ball(1.0), 32, 5, (-50, 16), TOWARDS_VIEWER, ambient=0.5)
    assert not outside.any()
