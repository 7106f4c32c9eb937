"""Point clouds as small pictures for report pages."""

from __future__ import annotations

import numpy as np
from PIL import Image

# More points than these fill the picture already, and cost time.
_MOST_POINTS = 20_000
_SUPERSAMPLING = 2
_AZIMUTH, _ELEVATION = np.pi / 6, np.pi / 7
_GROUND = np.array((250, 250, 248))
_FAR, _NEAR = np.array((176, 196, 222)), np.array((22, 48, 110))


def draw_cloud(points: np.ndarray, side: int = 160) -> Image.Image:
    """Draw a point cloud, y up, as an RGB image of `side` pixels a side: near points dark, far ones pale.

    The view is orthographic, from above to one side of z, whole and centred whatever the cloud's place and size. Of a
    very large cloud evenly spread rows are drawn.

    Args:
        points: `(n, 3)` or more columns, of which the first three are x, y and z.

    Raises:
        ValueError: no points, another shape, or coordinates that are not finite numbers.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[0] < 1 or points.shape[1] < 3:
        raise ValueError(f"Expected points (n, 3), at least one, got {points.shape}. Pass one cloud, not a batch.")
    points = points[:: -(-len(points) // _MOST_POINTS), :3].astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError("Expected finite coordinates, got NaN or infinity. Remove those points.")
    low, high = points.min(axis=0), points.max(axis=0)
    points = points - (low / 2 + high / 2)
    # Divided by the largest coordinate first: squares of very large or small ones would overflow or vanish.
    points /= np.abs(points).max() or 1.0
    points /= np.linalg.norm(points, axis=1).max() or 1.0
    x, y, z = points.T
    right = x * np.cos(_AZIMUTH) - z * np.sin(_AZIMUTH)
    depth = x * np.sin(_AZIMUTH) + z * np.cos(_AZIMUTH)
    up = y * np.cos(_ELEVATION) - depth * np.sin(_ELEVATION)
    depth = y * np.sin(_ELEVATION) + depth * np.cos(_ELEVATION)

    wide = side * _SUPERSAMPLING
    radius = wide * min(0.02, 0.25 / np.sqrt(len(points)) + 0.004)
    reach = wide / 2 - radius - 1
    order = np.argsort(depth, kind="stable")
    centre = np.stack([wide / 2 - reach * up, wide / 2 + reach * right], axis=1)[order]
    nearness = (depth[order, None] + 1) / 2
    colours = (_FAR + nearness * (_NEAR - _FAR)).astype(np.uint8)
    steps = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    disc = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    disc = disc[np.linalg.norm(disc, axis=1) <= radius]
    pixels = np.empty((wide, wide, 3), dtype=np.uint8)
    pixels[:] = _GROUND
    row, column = (centre[:, None] + disc).astype(int).transpose(2, 0, 1)
    # Of what is assigned to one pixel the last stays: the nearest.
    pixels[row, column] = colours[:, None]
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
