"""Triangle meshes in numpy: surfaces built from profiles, paths and outlines, points on them and their projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

_AXES = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}


@dataclass(frozen=True)
class Mesh:
    """Hold triangles: `vertices` (v, 3), `faces` (f, 3) of their indices, `tones` (f,) of their brightness.

    y points up. A tone of 1 is the colour of the body as it is, of 0 black.
    """

    vertices: np.ndarray
    faces: np.ndarray
    tones: np.ndarray

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Mesh:
        return replace(self, vertices=self.vertices + np.array((x, y, z)))

    def turned(self, axis: str, angle: float) -> Mesh:
        """Turn about a coordinate axis, by radians."""
        return replace(self, vertices=self.vertices @ rotation(axis, angle).T)

    def toned(self, factor: float) -> Mesh:
        return replace(self, tones=self.tones * factor)

    def corners(self) -> np.ndarray:
        """Return the corners of the triangles: `(f, 3, 3)`."""
        return self.vertices[self.faces]

    def unit(self) -> Mesh:
        """Move the centre of the bounding box to the origin, and the farthest vertex to a distance of 1."""
        centred = self.vertices - (self.vertices.min(axis=0) + self.vertices.max(axis=0)) / 2
        return replace(self, vertices=centred / np.linalg.norm(centred, axis=1).max())


def rotation(axis: str, angle: float) -> np.ndarray:
    """Return the matrix `(3, 3)` that turns columns about a coordinate axis, by radians."""
    first, second = _AXES[axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def joined(*meshes: Mesh) -> Mesh:
    """Put meshes side by side in one."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=True)]),
        np.concatenate([mesh.tones for mesh in meshes]),
    )


def box(width: float, height: float, depth: float) -> Mesh:
    """Return a box about the origin: sizes along x, y and z."""
    square = np.array([(-width, -height), (width, -height), (width, height), (-width, height)]) / 2
    return extruded(square, depth)


def extruded(outline: np.ndarray, depth: float) -> Mesh:
    """Return the prism over an outline `(n, 2)` in x and y, about z = 0; its centre has to see every corner."""
    count = len(outline)
    ring = np.concatenate([outline, outline.mean(axis=0, keepdims=True)])
    sides = [np.column_stack([ring, np.full(count + 1, z)]) for z in (-depth / 2, depth / 2)]
    here, after = np.arange(count), (np.arange(count) + 1) % count
    caps = np.stack([here, after, np.full(count, count)], axis=1)
    walls = _quads(here, after, after + count + 1, here + count + 1)
    return _mesh(np.concatenate(sides), np.concatenate([caps, caps + count + 1, walls]))


def revolved(profile: Sequence[tuple[float, float]], segments: int = 20) -> Mesh:
    """Return the surface that a profile of (radius, height) sweeps about the y axis."""
    radii, heights = np.array(profile).T
    angles = np.arange(segments) * 2 * np.pi / segments
    rings = np.stack(
        [np.outer(radii, np.cos(angles)), np.repeat(heights[:, None], segments, 1), np.outer(radii, np.sin(angles))],
        axis=-1,
    )
    return _grid(rings, closed=False)


def ball(radius: float) -> Mesh:
    """Return a ball about the origin."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 11)
    return revolved([(radius * np.cos(angle), radius * np.sin(angle)) for angle in angles])


def tube(
    path: np.ndarray, radius: float, *, across: tuple[float, float, float] = (0, 1, 0), closed: bool = False
) -> Mesh:
    """Return a round tube along a path `(n, 3)`, open at its ends or `closed` to a ring.

    `across` is a direction that the path never takes.
    """
    along = np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0) if closed else np.gradient(path, axis=0)
    along = along / np.linalg.norm(along, axis=1, keepdims=True)
    first = np.cross(along, across)
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(along, first)
    angles = np.arange(8) * np.pi / 4
    around = np.cos(angles)[:, None] * first[:, None] + np.sin(angles)[:, None] * second[:, None]
    return _grid(path[:, None] + radius * around, closed=closed)


def surface_points(mesh: Mesh, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw points from the surface, each part of it in proportion to its area: `(count, 3)`."""
    corners = mesh.corners()
    areas = np.cumsum(np.linalg.norm(_normals(corners), axis=1))
    drawn = corners[np.searchsorted(areas, generator.uniform(0, areas[-1], count), side="right")]
    root, share = np.sqrt(generator.random((count, 1))), generator.random((count, 1))
    return (1 - root) * drawn[:, 0] + root * (1 - share) * drawn[:, 1] + root * share * drawn[:, 2]


def project(
    mesh: Mesh, side: int, scale: float, centre: tuple[float, float], light: np.ndarray, ambient: float
) -> tuple[np.ndarray, np.ndarray]:
    """Look at a unit mesh along -z, from 4 units away: which pixels show it, and how bright they are.

    Lambert shading by one light; both sides of a face are seen.

    Args:
        side, scale, centre: pixels a side of the square picture, a unit, and x (right) and y (down) of the origin.
        light: (3,), unit direction to the light.
        ambient: brightness in [0, 1] of what the light does not reach.

    Returns:
        A mask (side, side), and the brightness of its true pixels, row by row.
    """
    distance = 4.0
    corners = mesh.corners()
    towards = np.array((0, 0, distance)) - corners.mean(axis=1)
    normals = _normals(corners)
    normals *= np.where((normals * towards).sum(axis=1) < 0, -1, 1)[:, None]
    # A face without area has no normal, and no pixel either.
    lengths = np.maximum(np.linalg.norm(normals, axis=1), np.finfo(float).tiny)
    brightness = mesh.tones * (ambient + (1 - ambient) * np.maximum(0, normals @ light / lengths))
    # Its inverse is what is linear over a projected triangle.
    nearness = distance / (distance - corners[..., 2])
    flat = np.array((scale, -scale)) * corners[..., :2] * nearness[..., None] + centre
    shown = _nearest_faces(flat, nearness, side)
    return shown >= 0, brightness[shown[shown >= 0]]


def _nearest_faces(flat: np.ndarray, nearness: np.ndarray, side: int) -> np.ndarray:
    """Return the index of the face that each pixel centre shows, -1 where there is none: `(side, side)`."""
    low = np.clip(np.floor(flat.min(axis=1)), 0, side).astype(int)
    high = np.clip(np.ceil(flat.max(axis=1)), 0, side).astype(int)
    widths, heights = (high - low).T
    counts = widths * heights
    face = np.repeat(np.arange(len(flat)), counts)
    within = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    x, y = low[face, 0] + within % widths[face], low[face, 1] + within // widths[face]
    pixel = np.stack([x, y], axis=1) + 0.5
    first, second, third = (flat[face, corner] - pixel for corner in range(3))
    weights = np.stack([_cross(second, third), _cross(third, first), _cross(first, second)], axis=1)
    total = weights.sum(axis=1)
    inside = (weights * np.sign(total)[:, None] >= 0).all(axis=1) & (total != 0)
    depth = (weights[inside] * nearness[face[inside]]).sum(axis=1) / total[inside]
    order = np.argsort(depth, kind="stable")
    shown = np.full((side, side), -1)
    # Of what is assigned to one pixel the last stays: the nearest.
    shown[y[inside][order], x[inside][order]] = face[inside][order]
    return shown


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]


def _normals(corners: np.ndarray) -> np.ndarray:
    """Return normals of the faces whose lengths are twice their areas."""
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _grid(rings: np.ndarray, *, closed: bool) -> Mesh:
    """Join neighbouring rings of vertices `(rings, points, 3)`, the last with the first too where `closed`."""
    rows, columns, _ = rings.shape
    numbers = np.arange(rows * columns).reshape(rows, columns)
    above = np.roll(numbers, -1, axis=0) if closed else numbers[1:]
    below = numbers if closed else numbers[:-1]
    corners = (below, np.roll(below, -1, axis=1), np.roll(above, -1, axis=1), above)
    return _mesh(rings.reshape(-1, 3), _quads(*(corner.ravel() for corner in corners)))


def _quads(first: np.ndarray, second: np.ndarray, third: np.ndarray, fourth: np.ndarray) -> np.ndarray:
    """Cut each quadrilateral into two triangles."""
    return np.concatenate([np.stack([first, second, third], axis=1), np.stack([first, third, fourth], axis=1)])


def _mesh(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    return Mesh(vertices.astype(float), faces, np.ones(len(faces)))
