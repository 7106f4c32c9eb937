# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Point clouds from arrays and files, in bounded memory, whatever the order of their points."""

from __future__ import annotations

import io
import math
import re
import tokenize
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from .loading_cmcr import DAMAGES, describe, open_item, to_numpy
from .mesh_loading_cmcr import NamedError, Shape, check_number, read_off, read_ply

MAX_BYTES = 2**30  # of a file, and of what an archive unpacks to
MAX_COLUMNS = 16  # more are another layout, such as a transposed cloud
MAX_COORDINATE = 1e9
# What numpy, the standard library and the readers here raise on damaged files, depending on the place.
ARRAY_DAMAGES = (*DAMAGES, tokenize.TokenError, zipfile.BadZipFile)


def load_point_cloud(
    item: Any,
    *,
    channels: int = 3,
    max_points: int = 10_000,
    min_points: int = 1,
    normalize: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Read a point cloud as `(points, channels)` float32, of at most `max_points` points.

    The content of a file decides on its format, whatever its name. Of a mesh (.ply or .off with faces), `max_points`
    points are drawn evenly from the surface, their colours interpolated between the vertices; polygons are cut into
    fans.

    Args:
        item: array, tensor or nested list `(points, 3 or more)`: x, y, z, for 6 channels then r, g, b in 0..1; columns
            beyond that have no effect; a dict with `xyz` and perhaps `rgb`, `(points, 3)` each; or a path, encoded
            bytes or `datasets` dict of .npy (such an array), .npz (`xyz` and perhaps `rgb`, or one such array), .ply
            (colours are the `red`, `green` and `blue` of vertices) or .off (without colours).
        channels: 3 for xyz, 6 for xyz and rgb.
        max_points: of a larger cloud, so many different points are drawn; which ones does not depend on their order.
        min_points: fewer are an error; a point encoder needs as many as it has in a group.
        normalize: move the centroid of what was drawn to the origin and scale the largest norm to 1, in float64 and
            whatever the order of the points; a cloud of one place becomes zeros.
        seed: of what is drawn.

    Raises:
        ValueError: the file is missing, damaged, a pickle, larger than 1 GiB or in another format; there are no points
            or more than 10 million; a coordinate is not finite or beyond 1e9; colours are missing or not floats in
            0..1; a mesh has no area; the array has another shape or type.
    """
    if channels not in (3, 6) or max_points < 1:
        raise ValueError(
            f"Expected channels=3 (xyz) or channels=6 (xyz, rgb), and max_points of at least 1, got {channels} and "
            f"{max_points}."
        )
    name = "the point cloud"
    if isinstance(item, Mapping) and item.get("xyz") is not None:
        shape = _joined(item["xyz"], item.get("rgb"), name)
    elif isinstance(item, Mapping) and item.get("bytes") is None and item.get("path") is None:
        raise ValueError(f"Expected the point cloud dict to hold xyz, bytes or a path, got the keys {list(item)}.")
    else:
        with open_item(item, "point cloud") as (stream, name):
            shape = _split(item, name) if stream is None else _read(stream, name)
    points = _checked(shape, channels, name)
    generator = np.random.default_rng(seed)
    if shape.triangles is not None:
        points = _sample_surface(points, shape.triangles, max_points, generator, name)
    elif len(points) > max_points:
        points = _subsample(points, max_points, generator)
    if len(points) < min_points:
        raise ValueError(
            f"Expected {name} with at least {min_points} points, as many as a group of the point encoder has, got "
            f"{len(points)}. Leave it out."
        )
    if normalize:
        points = np.concatenate([_normalized(points[:, :3]), points[:, 3:]], axis=1)
    return points.astype(np.float32)


def _split(value: Any, name: str) -> Shape:
    points = to_numpy(value)
    if points.ndim != 2 or not 3 <= points.shape[1] <= MAX_COLUMNS or points.dtype.kind not in "fiu":
        raise NamedError(
            f"Expected {name} as numbers (points, 3) for xyz or (points, 6) with rgb, a path, bytes or a dict, got "
            f"{describe(value)}. Transpose what has its points in columns, and pass a batch as a list."
        )
    return Shape(points[:, :3], points[:, 3:6] if points.shape[1] >= 6 else None)


def _joined(xyz: Any, rgb: Any, name: str) -> Shape:
    points, colours = to_numpy(xyz), None if rgb is None else to_numpy(rgb)
    for key, values in (("xyz", points), ("rgb", colours)):
        if values is None:
            continue
        if values.ndim != 2 or values.shape != (len(points), 3) or values.dtype.kind not in "fiu":
            raise NamedError(
                f"Expected {key!r} of {name} as numbers (points, 3), a row for each row of 'xyz', got "
                f"{describe(values)}. Save or pass it so."
            )
    return Shape(points, colours)


def _checked(shape: Shape, channels: int, name: str) -> np.ndarray:
    """Return the wanted columns of a shape, in their own precision."""
    xyz, rgb = shape.xyz, shape.rgb
    check_number(len(xyz), "points", name)
    low, high = float(xyz.min()), float(xyz.max())
    # A comparison with NaN is false.
    if not -MAX_COORDINATE <= low <= high <= MAX_COORDINATE:
        raise ValueError(
            f"Expected finite coordinates of at most {MAX_COORDINATE:g} in {name}, got {low} to {high}. Remove such "
            "points."
        )
    if channels == 3:
        points = xyz
    elif rgb is None:
        raise ValueError(f"Expected colours in {name} for channels=6, got none. Add rgb, or pass channels=3.")
    elif rgb.dtype.kind != "f" or not 0 <= rgb.min() <= rgb.max() <= 1:
        raise ValueError(
            f"Expected rgb of {name} as floats in 0..1, got {rgb.dtype} from {rgb.min()} to {rgb.max()}. Divide it by "
            "the largest value that it may have."
        )
    else:
        points = np.concatenate([xyz, rgb], axis=1)
    # The sum with 0 makes one zero of two, which no order tells apart.
    return (points if points.dtype.kind == "f" else points.astype(np.float64)) + 0


def _subsample(points: np.ndarray, number: int, generator: np.random.Generator) -> np.ndarray:
    """Draw different points, each as likely as any other, whatever the order in which they are given."""
    order = np.lexsort(points.T[::-1])
    drawn = np.argsort(generator.random(len(points)), kind="stable")[:number]
    return points[order[np.sort(drawn)]]


def _sample_surface(
    vertices: np.ndarray, triangles: np.ndarray, number: int, generator: np.random.Generator, name: str
) -> np.ndarray:
    """Draw points evenly from the surface of a mesh; channels beyond xyz are interpolated like these."""
    vertices = vertices.astype(np.float64)
    origin = vertices[triangles[:, 0], :3]
    normals = np.cross(vertices[triangles[:, 1], :3] - origin, vertices[triangles[:, 2], :3] - origin)
    bounds = np.cumsum(np.sqrt((normals**2).sum(axis=1)))
    if not bounds[-1] > 0:
        raise ValueError(f"Expected a surface with an area in {name}, got {len(bounds)} triangles of none. Repair it.")
    chosen, along, across = generator.random((3, number))
    # The product may round up to the end.
    index = np.searchsorted(bounds, chosen * bounds[-1], side="right").clip(max=len(bounds) - 1)
    folded = along + across > 1
    along[folded], across[folded] = 1 - along[folded], 1 - across[folded]
    first, second, third = (vertices[triangles[index, corner]] for corner in range(3))
    points: np.ndarray = first + along[:, None] * (second - first) + across[:, None] * (third - first)
    points[:, 3:] = points[:, 3:].clip(0, 1)
    return points


def _normalized(xyz: np.ndarray) -> np.ndarray:
    # Seen from a corner, one place is exactly 0, and distances keep their digits far from the origin.
    xyz = xyz.astype(np.float64)
    xyz -= xyz.min(axis=0)
    # Rounded once, the sum is that of any order.
    xyz -= [math.fsum(column) / len(xyz) for column in xyz.T.tolist()]
    extent = np.abs(xyz).max()
    if extent > 0:
        # Before their squares could vanish.
        xyz /= extent
        xyz /= np.sqrt((xyz**2).sum(axis=1).max())
    return xyz


def _read(stream: BinaryIO, name: str) -> Shape:
    size = stream.seek(0, 2)
    if size > MAX_BYTES:
        raise ValueError(f"Expected {name} with at most {MAX_BYTES} bytes, got {size}. Save a smaller part of it.")
    stream.seek(0)
    start = stream.read(4096)
    stream.seek(0)
    readers: dict[bytes, Callable[[BinaryIO, str], Shape]] = {
        rb"\x93NUMPY": lambda file, name: _split(_read_npy(file, name), name),
        rb"PK(\x03\x04|\x05\x06)": _read_npz,
        rb"ply\s": read_ply,
        rb"(\s|#.*\n)*(ST)?C?N?4?n?OFF": read_off,
    }
    reader = next((reader for pattern, reader in readers.items() if re.match(pattern, start)), None)
    if reader is None:
        raise ValueError(
            f"Cannot read {name}: it is {'not .npy, .npz, .ply or .off by its content' if size else 'empty'}. Save it "
            "as one of these; pickles are not read."
        )
    try:
        return reader(stream, name)
    except NamedError:
        raise
    except ARRAY_DAMAGES as error:
        raise ValueError(f"Cannot read {name}: it is damaged ({error!s:.200}). Copy or make it again.") from error


def read_npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and type of an .npy file, and leave the stream at its content.

    Raises:
        One of `ARRAY_DAMAGES`: it is damaged, or in a version that is for names of columns alone.
    """
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return formats[np.lib.format.read_magic(stream)](stream)


def _read_npy(stream: BinaryIO, name: str) -> np.ndarray:
    shape, fortran_order, dtype = read_npy_header(stream)
    if dtype.hasobject:
        raise NamedError(
            f"Expected {name} as plain numbers, got pickled objects, which can run code. Convert records of OpenShape "
            "by `python -m cmcr_hf.conversion.convert_openshape`, and save others with np.savez."
        )
    if dtype.kind not in "fiu" or len(shape) != 2 or min(shape) < 0:
        raise NamedError(
            f"Expected {name} as numbers (points, 3 or more), got {dtype!s:.80} of shape {shape!s:.80}. Save it "
            "with np.savez(file, xyz=...)."
        )
    position = stream.tell()
    size, held = math.prod(shape) * dtype.itemsize, stream.seek(0, 2) - position
    if size > held:
        raise ValueError(f"it ends after {held} of {size} bytes")
    stream.seek(position)
    return np.frombuffer(stream.read(size), dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_npz(stream: BinaryIO, name: str) -> Shape:
    with zipfile.ZipFile(stream) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        size = sum(info.file_size for info in infos.values())
        if size > MAX_BYTES:
            raise NamedError(f"Expected {name} to unpack to at most {MAX_BYTES} bytes, got {size}. Save less in it.")
        keys = [key for key in ("xyz", "rgb") if key in infos] if "xyz" in infos else list(infos)
        if "xyz" not in infos and len(infos) != 1:
            raise NamedError(
                f"Expected 'xyz' and perhaps 'rgb', or one array alone, in {name}, got {keys!s:.200}. Save it with "
                "np.savez(file, xyz=...)."
            )
        arrays = []
        for key in keys:
            if infos[key].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # The others unpack without a bound, and numpy writes none of them.
                raise ValueError(f"{key!r:.80} is compressed by method {infos[key].compress_type}")
            with archive.open(infos[key]) as member:
                # Asked for less than its all, it unpacks no more than it declares.
                content = io.BytesIO(member.read(infos[key].file_size))
                arrays.append(_read_npy(content, f"{key!r:.80} of {name}"))
    if "xyz" not in keys:
        return _split(arrays[0], name)
    return _joined(arrays[0], arrays[1] if len(arrays) > 1 else None, name)
