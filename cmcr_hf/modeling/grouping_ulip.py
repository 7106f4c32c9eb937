# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups of neighbouring points: farthest point sampling and nearest neighbours, exact and independent of the order.

What it gives depends on the set of points alone: not on their order, the batch, the padding or the device. Distances
are squares that are added as x + y + z in float32, one rounding an operation, wherever they are computed.
"""

from bisect import bisect_left, bisect_right

import numpy as np
import torch

# Blocks of a row of distances in the search for nearest neighbours on other devices than the CPU.
BLOCK = 16


@torch.compiler.disable
def group_points(
    point_clouds: torch.Tensor,
    num_groups: int,
    group_size: int,
    *,
    num_points: torch.Tensor | None = None,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut clouds into groups: centres by farthest point sampling, and the nearest points of each, seen from it.

    Args:
        point_clouds: `(clouds, points, channels)`, finite; the first three channels are coordinates.
        num_groups, group_size: centres a cloud, and points a group, the centre itself included.
        num_points: `(clouds,)`, how many points of each cloud count; the rest is padding.
        seed: start the sampling at the point that lies farthest in a direction drawn from this seed; `None` starts at
            the point of the smallest coordinates (x, then y, then z).

    Returns:
        `(clouds, num_groups, 3)` centres and `(clouds, num_groups, group_size, channels)` points, whose coordinates
        are relative to their centre. Where two points are equally far or near, the one of smaller coordinates comes
        first. A cloud of fewer points than `num_groups` repeats its first one.

    No gradient flows back to the points. `torch.compile` leaves this function as it is.

    Raises:
        ValueError: another shape, other `num_points` than whole numbers up to it, fewer points than a group, or points
            that are not finite.
    """
    if point_clouds.ndim != 3 or point_clouds.shape[2] < 3:
        raise ValueError(f"Expected point clouds (clouds, points, 3 or more), got {tuple(point_clouds.shape)}.")
    total = point_clouds.shape[1]
    if num_points is not None:
        whole = isinstance(num_points, torch.Tensor) and not num_points.is_floating_point()
        if not whole or num_points.shape != point_clouds.shape[:1] or num_points.max() > total:
            raise ValueError(
                f"Expected num_points as whole numbers up to {total}, one for each of {len(point_clouds)} clouds, got "
                f"{num_points!r:.200}."
            )
    fewest = total if num_points is None else int(num_points.min())
    if fewest < group_size:
        raise ValueError(f"Expected at least {group_size} points a cloud, the size of a group, got {fewest}.")
    # In half precision, distances of neighbours would not be told apart.
    points = point_clouds.detach().float()
    if points.device.type == "cpu":
        sizes = [total] * len(points) if num_points is None else num_points.tolist()
        pairs = [
            _group_cloud(cloud[:size].numpy(), num_groups, group_size, seed)
            for cloud, size in zip(points, sizes, strict=True)
        ]
        centers, groups = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return centers, groups
    padding = None
    if num_points is not None and fewest < total:
        padding = torch.arange(total, device=points.device) >= num_points.to(points.device)[:, None]
    return _group_clouds(points, num_groups, group_size, padding, seed)


def _check_finite(finite: bool) -> None:
    if not finite:
        raise ValueError("Expected finite points, got NaN or infinity. Remove those points.")


def _direction(seed: int) -> list[float]:
    direction: list[float] = torch.randn(3, generator=torch.Generator().manual_seed(seed)).tolist()
    return direction


# On the CPU, numpy: its calls on a few thousand numbers cost a fraction of torch's.


def _group_cloud(
    points: np.ndarray, num_groups: int, group_size: int, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(num_groups, 3)` centres and `(num_groups, group_size, channels)` points of one cloud."""
    _check_finite(bool(np.isfinite(points).all()))
    points = points[_sorted_by_coordinates(points)]
    coordinates = np.ascontiguousarray(points[:, :3].T)
    start = 0
    if seed is not None:
        x, y, z = _direction(seed)
        start = int((coordinates[0] * x + coordinates[1] * y + coordinates[2] * z).argmax())
    chosen, reach = _sampled(coordinates, num_groups, start)
    neighbours = _neighbours(coordinates, chosen, group_size, reach)
    centers = points[chosen, :3]
    groups = points[neighbours]
    groups[..., :3] -= centers[:, None]
    return centers, groups


def _sorted_by_coordinates(points: np.ndarray) -> np.ndarray:
    order: np.ndarray = points[:, 0].argsort()
    x = points[order, 0]
    equal = x[1:] == x[:-1]
    if equal.sum() > len(x) // 16:
        return np.lexsort(points.T[::-1])
    # Where few have an equal first coordinate, sorting these by all channels is several times faster.
    tied = np.concatenate([equal, [False]]) | np.concatenate([[False], equal])
    rows = order[tied]
    order[tied] = rows[np.lexsort(points[rows].T[::-1])]
    return order


def _sampled(coordinates: np.ndarray, number: int, start: int) -> tuple[np.ndarray, float]:
    """Return the indices of farthest point sampling, and the largest squared distance of a point from its centre.

    A new centre can only be nearer than a former one to points whose x alone is near enough. The points are sorted by
    x, so these are a slice.
    """
    x, yz = coordinates[0], coordinates[1:]
    places = x.tolist()
    nearest = np.full(len(x), np.inf, np.float32)
    distance, squares = np.empty_like(x), np.empty_like(yz)
    chosen = np.empty(number, np.int64)
    farthest, reach = start, np.inf
    for index in range(number):
        chosen[index] = farthest
        low, high = _bounds(places, places[farthest], places[farthest], reach)
        part, both, old = distance[low:high], squares[:, low:high], nearest[low:high]
        np.subtract(x[low:high], x[farthest], out=part)
        np.multiply(part, part, out=part)
        np.subtract(yz[:, low:high], yz[:, farthest, None], out=both)
        np.multiply(both, both, out=both)
        np.add(part, both[0], out=part)
        np.add(part, both[1], out=part)
        np.minimum(old, part, out=old)
        farthest = int(nearest.argmax())
        reach = float(nearest[farthest])
    return chosen, reach


def _bounds(places: list[float], first: float, last: float, reach: float) -> tuple[int, int]:
    """Return the slice of sorted places at most the root of `reach` from those between two, and a bit more."""
    # Differences and squares are rounded.
    width = reach**0.5 * 1.000001
    return max(bisect_left(places, first - width) - 1, 0), bisect_right(places, last + width) + 1


def _neighbours(coordinates: np.ndarray, chosen: np.ndarray, number: int, reach: float) -> np.ndarray:
    """Return the indices of the nearest points of every centre, nearest first: `(centres, number)`."""
    places = coordinates[0].tolist()
    found = np.empty((len(chosen), number), np.int64)
    # Every point is within `reach` of some centre, so that this bound holds a few times the points of a centre. What
    # may lie within it is told by a matrix product, whose rounding is far below the margin.
    bound = np.float32(2.5 * reach)
    middled = coordinates - coordinates.mean(axis=1, keepdims=True)
    norms = (middled * middled).sum(axis=0)
    likely = bound + np.float32(1e-5) * norms.max()
    factors = np.concatenate([middled, norms[None], np.ones_like(norms)[None]])
    # Neighbouring centres share a slice of the points.
    by_x = chosen.argsort()
    for rows in (by_x[first : first + _TILE] for first in range(0, len(by_x), _TILE)):
        centers = chosen[rows]
        low, high = _bounds(places, places[centers[0]], places[centers[-1]], float(bound))
        high = min(high, len(places))
        of_centers = np.concatenate(
            [-2 * middled[:, centers], np.ones((1, len(rows)), np.float32), norms[None, centers]]
        )
        near = np.flatnonzero(of_centers.T @ factors[:, low:high] <= likely)
        row, point = np.divmod(near, high - low)
        point += low
        distances = _distances(coordinates[:, point], coordinates[:, centers[row]])
        inside = distances <= bound
        row, keys = row[inside], _keys(distances[inside], point[inside])
        counts = np.bincount(row, minlength=len(rows))
        table = np.full((len(rows), max(counts.max(), number)), _NONE)
        table[row, np.arange(len(row)) - (counts.cumsum() - counts)[row]] = keys
        for lonely in (counts < number).nonzero()[0]:
            every = _distances(coordinates, coordinates[:, centers[lonely], None])
            table[lonely, :number] = np.partition(_keys(every, np.arange(len(every))), number - 1)[:number]
        table.sort(axis=1)
        found[rows] = table[:, :number] & _INDEX
    return found


# Centres searched at once. With more, a matrix library hands the product to threads, which costs more than it.
_TILE = 8
_INDEX, _NONE = np.uint64(2**32 - 1), np.uint64(2**64 - 1)


def _distances(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return the squared distances of `(3, points)` from `(3, points)` or `(3, 1)` centres."""
    squares = np.square(points - centers)
    distances: np.ndarray = squares[0] + squares[1] + squares[2]
    return distances


def _keys(distances: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return numbers in the order of distance, then of index: the bits of floats above 0 have the order of these."""
    return distances.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint64)


# On other devices, torch, all clouds at once.


def _group_clouds(
    points: torch.Tensor, num_groups: int, group_size: int, padding: torch.Tensor | None, seed: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what [`group_points`] does, for clouds whose `padding`, `(clouds, points)`, is to have no effect.

    Memory: about 12 bytes for each pair of a group and a point.
    """
    if padding is not None:
        points = points.masked_fill(padding[..., None], 0)
    _check_finite(bool(points.isfinite().all()))
    points = points.gather(1, _coordinate_order(points, padding)[..., None].expand_as(points))
    coordinates = points[..., :3].transpose(1, 2).contiguous()
    if padding is not None:
        padding = padding.sort(dim=1).values
    chosen, distances = _farthest_points(coordinates, num_groups, _start(coordinates, padding, seed), padding)
    neighbours = _nearest(distances, group_size)
    centers = coordinates.transpose(1, 2).gather(1, chosen[..., None].expand(-1, -1, 3))
    groups = points.gather(1, neighbours.flatten(1)[..., None].expand(-1, -1, points.shape[2]))
    groups = groups.unflatten(1, (num_groups, group_size))
    groups[..., :3] -= centers[:, :, None]
    return centers, groups


def _coordinate_order(points: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Return the indices that sort the points of each cloud by their channels, padding last: `(clouds, points)`."""
    order = torch.arange(points.shape[1], device=points.device).expand(points.shape[:2])
    keys = [points[..., channel] for channel in range(points.shape[2])]
    if padding is not None:
        keys = [padding, *keys]
    for key in reversed(keys):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


def _start(coordinates: torch.Tensor, padding: torch.Tensor | None, seed: int | None) -> torch.Tensor:
    if seed is None:
        return coordinates.new_zeros(len(coordinates), 1, dtype=torch.long)
    x, y, z = _direction(seed)
    heights = coordinates[:, 0] * x + coordinates[:, 1] * y + coordinates[:, 2] * z
    if padding is not None:
        heights = heights.masked_fill(padding, -torch.inf)
    return heights.argmax(dim=1, keepdim=True)


def _farthest_points(
    coordinates: torch.Tensor, number: int, start: torch.Tensor, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(clouds, number)` indices, and `(clouds, number, points)` squared distances of all points from them."""
    clouds, _, total = coordinates.shape
    distances = coordinates.new_empty(number, clouds, total)
    squares = torch.empty_like(coordinates)
    nearest = coordinates.new_full((clouds, total), torch.inf)
    if padding is not None:
        nearest.masked_fill_(padding, -1)
    chosen = start
    indices = []
    for distance in distances:
        indices.append(chosen)
        center = coordinates.gather(2, chosen[:, None].expand(-1, 3, -1))
        torch.sub(coordinates, center, out=squares).square_()
        # Added in this order, not by a kernel's.
        torch.add(squares[:, 0], squares[:, 1], out=distance).add_(squares[:, 2])
        torch.minimum(nearest, distance, out=nearest)
        chosen = nearest.argmax(dim=1, keepdim=True)
    if padding is not None:
        distances.masked_fill_(padding, torch.inf)
    return torch.cat(indices, dim=1), distances.transpose(0, 1)


def _nearest(distances: torch.Tensor, number: int) -> torch.Tensor:
    """Return the indices of the smallest of each row, nearest first, then by index: `(clouds, centers, number)`.

    The smallest numbers lie in those blocks of a row whose own minima are smallest, since each of these blocks holds
    at least one number below every other block. Searching these alone is several times faster than the whole row.
    """
    total = distances.shape[-1]
    # The bits of floats that are not negative have the order of the floats; behind them, the index decides.
    keys = (distances.view(torch.int32).long() << 32) | torch.arange(total, device=distances.device)
    blocks = total // BLOCK
    if blocks >= 2 * number:
        minima = keys[..., : blocks * BLOCK].unflatten(-1, (BLOCK, blocks)).amin(dim=-2)
        best = minima.topk(number, largest=False).indices
        inside = torch.arange(BLOCK, device=distances.device)[:, None] * blocks
        candidates = (best[..., None, :] + inside).flatten(-2)
        rest = torch.arange(blocks * BLOCK, total, device=distances.device).expand(*best.shape[:-1], -1)
        keys = keys.gather(-1, torch.cat([candidates, rest], dim=-1))
    return keys.topk(number, largest=False).values & 0xFFFFFFFF
