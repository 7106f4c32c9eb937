# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Groups of neighbouring points: farthest point sampling and nearest neighbours, exact and independent of the order.

Pure torch. What it gives depends on the set of points alone: not on their order, the batch, the padding or the device.
"""

import torch

# Blocks of a row of distances in the search for nearest neighbours; the best of several sizes for 8 to 10 thousand
# points.
BLOCK = 16


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

    Raises:
        ValueError: the shape is another one, or a cloud has fewer points than a group.
    """
    if point_clouds.ndim != 3 or point_clouds.shape[2] < 3:
        raise ValueError(f"Expected point clouds (clouds, points, 3 or more), got {tuple(point_clouds.shape)}.")
    total = point_clouds.shape[1]
    fewest = total if num_points is None else int(num_points.min())
    if fewest < group_size:
        raise ValueError(f"Expected at least {group_size} points a cloud, the size of a group, got {fewest}.")
    # In half precision, distances of neighbours would not be told apart.
    points = point_clouds.float()
    padding = None
    if num_points is not None:
        padding = torch.arange(total, device=points.device) >= num_points.to(points.device)[:, None]
    points = points.gather(1, _coordinate_order(points, padding)[..., None].expand_as(points))
    coordinates = points[..., :3].transpose(1, 2).contiguous()
    if padding is not None:
        padding = padding.sort(dim=1).values
    centers, distances = _farthest_points(coordinates, num_groups, _start(coordinates, padding, seed), padding)
    neighbours = _nearest(distances, group_size)
    center_points = coordinates.transpose(1, 2).gather(1, centers[..., None].expand(-1, -1, 3))
    groups = points.gather(1, neighbours.flatten(1)[..., None].expand(-1, -1, points.shape[2]))
    groups = groups.unflatten(1, (num_groups, group_size))
    groups[..., :3] -= center_points[:, :, None]
    return center_points, groups


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
    x, y, z = torch.randn(3, generator=torch.Generator().manual_seed(seed)).tolist()
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
    """Return the indices of the smallest of each row, nearest first: `(clouds, centers, number)`.

    The smallest numbers lie in those blocks of a row whose own minima are smallest, since each of these blocks holds
    at least one number below every other block. Searching these alone is several times faster than the whole row.
    """
    total = distances.shape[-1]
    blocks = total // BLOCK
    if blocks < 2 * number:
        return distances.topk(number, largest=False).indices
    minima = distances[..., : blocks * BLOCK].unflatten(-1, (BLOCK, blocks)).amin(dim=-2)
    best = minima.topk(number, largest=False).indices
    inside = torch.arange(BLOCK, device=distances.device)[:, None] * blocks
    candidates = (best[..., None, :] + inside).flatten(-2)
    rest = torch.arange(blocks * BLOCK, total, device=distances.device).expand(*best.shape[:-1], -1)
    candidates = torch.cat([candidates, rest], dim=-1)
    return candidates.gather(-1, distances.gather(-1, candidates).topk(number, largest=False).indices)
