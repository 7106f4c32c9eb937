# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Vertices and faces of the mesh formats .ply and .off, exactly as many as a file declares, in bounded memory."""

from __future__ import annotations

import io
import itertools
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

MAX_POINTS = 10_000_000  # and faces, and triangles: at these limits, reading takes about 2 GB
MAX_LINE = 2**20  # characters; split at once, a text without line ends would take many times its size
_PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}


class NamedError(ValueError):
    """An error that names the file; of a damage, only the caller knows the file."""


@dataclass
class Shape:
    """Points `(points, 3)`, perhaps their colours `(points, 3)`, and of a mesh its triangles as indices of points."""

    xyz: np.ndarray
    rgb: np.ndarray | None = None
    triangles: np.ndarray | None = None


def check_number(number: int, what: str, name: str, most: int = MAX_POINTS) -> None:
    """Check that there are some points, faces or the like, and not too many; ValueError names the file."""
    if not 1 <= number <= most:
        raise NamedError(f"Expected 1 to {most} {what} in {name}, got {number}. Thin it out, or leave it out.")


@dataclass
class _Element:
    """The rows of one kind in a mesh file: their number, and what is in each: `(name, type of its length, type)`.

    Types are numpy's. Only a list has a type of its length, which stands before its numbers; elsewhere it is empty.
    """

    number: int
    properties: list[tuple[str, str, str]]

    @property
    def types(self) -> dict[str, str]:
        """The type of each number, `list` where there may be several."""
        return {name: "list" if length else kind for name, length, kind in self.properties}


# The lengths of lists, and their numbers one behind the other.
_Lists = tuple[np.ndarray, np.ndarray]


class _Text:
    """Rows of numbers, one a line."""

    def __init__(self, stream: BinaryIO):
        self.text = io.TextIOWrapper(stream, encoding="latin-1")
        self.lines = self._lines()

    def _lines(self) -> Iterator[str]:
        """Yield the lines that hold something, without their comments."""
        while line := self.text.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise ValueError(f"a line has {MAX_LINE} characters or more")
            if line := line.split("#", 1)[0].strip():
                yield line

    def table(self, element: _Element, names: Sequence[str]) -> np.ndarray:
        """Read the rows of an element; returns the named numbers as `(rows, names)`."""
        rows = itertools.islice(self.lines, element.number)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"it ends before its {element.number} vertices")
        columns = [[*element.types].index(name) for name in names]
        table = np.loadtxt(itertools.chain([first], rows), comments=None, usecols=columns, ndmin=2)
        if len(table) < element.number:
            raise ValueError(f"it ends after {len(table)} of {element.number} vertices")
        return table

    def lists(self, element: _Element, wanted: str, name: str) -> _Lists:
        """Read the rows of an element; returns the lists of this name."""
        rows = itertools.islice(self.lines, element.number)
        return _collect((self._list(line.split(), element, wanted) for line in rows), element.number, name)

    @staticmethod
    def _list(numbers: list[str], element: _Element, wanted: str) -> list[int]:
        position = 0
        for name, is_list, _ in element.properties:
            length = int(numbers[position]) if is_list else 0
            if not 0 <= length < len(numbers) - position:
                raise ValueError(f"a list of {length} numbers stands in a line of {len(numbers)}")
            if name == wanted:
                return [int(number) for number in numbers[position + 1 : position + 1 + length]]
            position += 1 + length
        return []


class _Binary:
    """Rows of numbers, one behind the other."""

    def __init__(self, stream: BinaryIO, order: str):
        self.data, self.order, self.offset = stream.read(), order, 0

    def table(self, element: _Element, names: Sequence[str]) -> np.ndarray:
        """Read the rows of an element; returns the named numbers as `(rows, names)`."""
        table = self._records([(name, self.order + kind) for name, kind in element.types.items()], element.number)
        if table is None:
            raise ValueError(f"it ends before its {element.number} vertices do")
        self.offset += table.nbytes
        return np.stack([table[name] for name in names], axis=1)

    def lists(self, element: _Element, wanted: str, name: str) -> _Lists:
        """Read the rows of an element; returns the lists of this name."""
        if not element.number:
            return _collect((), 0, name)
        start = self.offset
        first = self._row(element)
        self.offset = start
        # Nearly always, all rows are as long as the first one.
        lengths = {f"{key} length": len(first[key]) for key, length, _ in element.properties if length}
        fields: list[Any] = []
        for key, length, kind in element.properties:
            fields += [(f"{key} length", self.order + length)] if length else []
            fields.append((key, self.order + kind, (len(first[key]),)))
        table = self._records(fields, element.number)
        if table is None or not all((table[key] == length).all() for key, length in lengths.items()):
            rows = (self._row(element).get(wanted, ()) for _ in range(element.number))
            return _collect(rows, element.number, name)
        self.offset += table.nbytes
        numbers = table[wanted] if wanted else np.empty((element.number, 0))
        check_number(max(1, numbers.size), "corners", name, 3 * MAX_POINTS)
        return np.full(element.number, numbers.shape[1]), numbers.astype(np.int64).reshape(-1)

    def _records(self, fields: list[Any], number: int) -> np.ndarray | None:
        """Return the next rows, or `None` where fewer are left."""
        dtype = np.dtype(fields)
        enough = dtype.itemsize * number <= len(self.data) - self.offset
        return np.frombuffer(self.data, dtype, number, self.offset) if enough else None

    def _row(self, element: _Element) -> dict[str, tuple]:
        row = {}
        for key, length, kind in element.properties:
            row[key] = self._take(kind, self._take(length, 1)[0] if length else 1)
        return row

    def _take(self, kind: str, number: int) -> tuple:
        layout = f"{self.order}{number}{np.dtype(kind).char}"
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return values


def _collect(rows: Iterable[Sequence[int]], number: int, name: str) -> _Lists:
    lengths, numbers = array("q"), array("q")
    for row in rows:
        lengths.append(len(row))
        numbers.extend(row)
        check_number(max(len(lengths), len(numbers)), "corners", name, 3 * MAX_POINTS)
    if len(lengths) < number:
        raise ValueError(f"it ends after {len(lengths)} of {number} rows")
    return np.array(lengths, np.int64), np.array(numbers, np.int64)


def _triangles(polygons: _Lists, vertices: int, name: str) -> np.ndarray:
    """Cut polygons, given as indices of vertices, into fans of triangles `(triangles, 3)`."""
    lengths, corners = polygons
    fans = (lengths - 2).clip(min=0)
    check_number(int(fans.sum()), "triangles", name)
    if corners.min() < 0 or corners.max() >= vertices:
        raise ValueError(f"its faces name the vertices {corners.min()} to {corners.max()} of {vertices}")
    first = np.repeat(np.cumsum(lengths) - lengths, fans)
    second = first + np.arange(1, len(first) + 1) - np.repeat(np.cumsum(fans) - fans, fans)
    return np.stack([corners[first], corners[second], corners[second + 1]], axis=1)


def read_off(stream: BinaryIO, name: str) -> Shape:
    """Read an .off file, a text; numbers of a vertex beyond its coordinates are left out.

    Raises:
        NamedError: it holds another number of dimensions, or too few or too many points.
        ValueError: it is damaged.
    """
    body = _Text(stream)
    # ModelNet has files whose numbers follow the keyword at once.
    found = re.match(r"(?:ST)?C?N?(4?n?)OFF\s*(.*)", next(body.lines, ""))
    if found is None or found[1] or found[2].startswith("BINARY"):
        raise NamedError(f"Expected {name} as a text with three coordinates a vertex, got another OFF. Save it so.")
    vertices, faces = map(int, (found[2] or next(body.lines, "")).split()[:2])
    check_number(vertices, "points", name)
    xyz = body.table(_Element(vertices, [(axis, "", "f8") for axis in "xyz"]), "xyz")
    if not faces:
        return Shape(xyz)
    check_number(faces, "faces", name)
    polygons = body.lists(_Element(faces, [("face", "i8", "i8")]), "face", name)
    return Shape(xyz, triangles=_triangles(polygons, vertices, name))


def read_ply(stream: BinaryIO, name: str) -> Shape:
    """Read a .ply file, text or binary, with the colours `red`, `green` and `blue` of its vertices scaled to 0..1.

    Raises:
        NamedError: it holds strips of triangles, or too few or too many points.
        ArithmeticError, LookupError, TypeError, ValueError, struct.error: it is damaged.
    """
    order, elements = _ply_header(stream)
    if "tristrips" in elements:
        raise NamedError(f"Expected the faces of {name} as polygons, got strips of triangles. Save it with faces.")
    vertex, face = (elements.get(key, _Element(0, [])) for key in ("vertex", "face"))
    check_number(vertex.number, "points", name)
    columns = [key for key in ("x", "y", "z", "red", "green", "blue") if vertex.types.get(key, "list") != "list"]
    indices = next((key for key in ("vertex_indices", "vertex_index") if face.types.get(key) == "list"), "")
    if columns[:3] != ["x", "y", "z"] or "list" in vertex.types.values() or (face.number and not indices):
        raise ValueError(f"its vertices have {[*vertex.types]!s:.80}, its faces {[*face.types]!s:.80}")
    body = _Binary(stream, order) if order else _Text(stream)
    points, polygons = np.empty((0, 3)), None
    for key, element in elements.items():
        if key == "vertex":
            points = body.table(element, columns)
        elif key == "face" and face.number:
            check_number(face.number, "faces", name)
            polygons = body.lists(element, indices, name)
        else:
            body.lists(element, "", name)
    rgb = None
    if len(columns) == 6:
        kinds = [np.dtype(vertex.types[key]) for key in columns[3:]]
        rgb = points[:, 3:] / [1.0 if kind.kind == "f" else np.iinfo(kind).max for kind in kinds]
    return Shape(points[:, :3], rgb, None if polygons is None else _triangles(polygons, len(points), name))


def _ply_header(stream: BinaryIO) -> tuple[str, dict[str, _Element]]:
    """Read a header; returns the order of bytes, empty for a text, and the elements in the order of the file."""
    start = stream.read(MAX_LINE)
    found = re.match(rb"ply[ \t]*(\r\n|\n|\r)(.*?\1)end_header[ \t]*\1", start, re.DOTALL)
    if found is None:
        raise ValueError("its header has no end")
    stream.seek(found.end())
    order, elements = None, {}
    element = _Element(0, [])
    for line in found[2].decode("latin-1").splitlines():
        match line.split():
            case ["format", kind, "1.0"]:
                order = _PLY_ORDERS[kind]
            case ["element", key, number] if key not in elements and number.isdecimal():
                element = elements[key] = _Element(int(number), [])
            case ["property", "list", length, kind, key]:
                element.properties.append((key, _PLY_TYPES[length], _PLY_TYPES[kind]))
            case ["property", kind, key]:
                element.properties.append((key, "", _PLY_TYPES[kind]))
            case ["comment" | "obj_info", *_] | []:
                pass
            case _:
                raise ValueError(f"its header holds {line!r:.80}")
    if order is None:
        raise ValueError("its header names no format")
    return order, elements
