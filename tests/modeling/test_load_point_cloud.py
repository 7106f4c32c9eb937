import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cmcr_hf.modeling.point_cloud_loading_cmcr as loading
from cmcr_hf.modeling.point_cloud_loading_cmcr import load_point_cloud


def cloud(points: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random points in the unit cube, with random colours."""
    return np.random.default_rng(seed).random((points, channels), dtype=np.float32)


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npz(save: Callable = np.savez, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def ply(vertices: np.ndarray, faces: list[list[int]] | None = None, format: str = "ascii", colours: str = "") -> bytes:
    """Encode vertices, with colours where they have a type, an edge, and faces with a flag before their indices."""
    order = ">" if "big" in format else "<"
    header = f"ply\nformat {format} 1.0\ncomment made by a test\nelement vertex {len(vertices)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz")
    header += "".join(f"property {colours} {colour}\n" for colour in ("red", "green", "blue") if colours)
    header += "element edge 1\nproperty int vertex1\nproperty int vertex2\n"
    if faces is not None:
        header += f"element face {len(faces)}\nproperty uchar flag\nproperty list uchar int vertex_indices\n"
    header += "end_header\n"
    if format == "ascii":
        kind = int if colours == "uchar" else float
        rows = [[*map(repr, row[:3].tolist()), *(repr(kind(value)) for value in row[3:])] for row in vertices]
        rows += [["0", "1"], *(["7", str(len(face)), *map(str, face)] for face in faces or [])]
        return (header + "".join(" ".join(row) + "\n" for row in rows)).encode()
    types = "fff" + {"": "", "uchar": "BBB", "float": "fff"}[colours]
    body = b"".join(
        struct.pack(order + types, *row[:3], *(int(value) if colours == "uchar" else value for value in row[3:]))
        for row in vertices.tolist()
    )
    body += struct.pack(order + "2i", 0, 1)
    body += b"".join(struct.pack(f"{order}BB{len(face)}i", 7, len(face), *face) for face in faces or [])
    return header.encode() + body


TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
TRIANGLES = [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]


def off(vertices: np.ndarray = TETRAHEDRON, faces: list[list[int]] | None = None, first: str = "OFF\n") -> bytes:
    faces = TRIANGLES if faces is None else faces
    rows = [f"{first}{len(vertices)} {len(faces)} 0", *(" ".join(map(repr, row)) for row in vertices.tolist())]
    return "\n".join([*rows, *(" ".join(map(str, [len(face), *face])) for face in faces), ""]).encode()


# Forms


@pytest.mark.parametrize("channels", [3, 6])
def test_every_form_of_a_cloud_gives_the_same_points(tmp_path: Path, channels: int) -> None:
    points = cloud(channels=channels)
    path = tmp_path / "wolke ü.bin"
    path.write_bytes(npy(points))
    parts = {"xyz": points[:, :3]} | ({"rgb": points[:, 3:]} if channels == 6 else {})
    forms = {
        "array": points,
        "double": points.astype(np.float64),
        "big endian": points.astype(">f4"),
        "fortran order": np.asfortranarray(points),
        "tensor": torch.from_numpy(points),
        "nested list": points.tolist(),
        "dict of arrays": parts,
        "dict of lists": {key: values.tolist() for key, values in parts.items()},
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "memoryview": memoryview(path.read_bytes()),
        "dict of bytes": {"bytes": path.read_bytes(), "path": "elsewhere.npy"},
        "dict of a path": {"bytes": None, "path": str(path)},
        "npy in fortran order": npy(np.asfortranarray(points)),
        "npy big endian": npy(points.astype(">f8")),
        "npz": npz(**parts),
        "npz compressed": npz(np.savez_compressed, **parts),
        "npz of one array": npz(cloud=points),
        "ply text": ply(points, colours="float" if channels == 6 else ""),
        "ply little": ply(points, format="binary_little_endian", colours="float" if channels == 6 else ""),
        "ply big": ply(points, format="binary_big_endian", colours="float" if channels == 6 else ""),
    }
    if channels == 3:
        forms["off"] = off(points, [])
    for name, form in forms.items():
        loaded = load_point_cloud(form, channels=channels)
        assert loaded.dtype == np.float32, name
        assert np.array_equal(loaded, points), name


def test_three_channels_drop_colours_and_six_drop_what_is_behind_them() -> None:
    points = cloud(channels=9)
    points[:, 6:] = 77
    assert np.array_equal(load_point_cloud(points), points[:, :3])
    assert np.array_equal(load_point_cloud(points, channels=6), points[:, :6])
    assert np.array_equal(load_point_cloud({"xyz": points[:, :3], "rgb": points[:, 3:6]}), points[:, :3])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, np.float16, np.longdouble])
def test_coordinates_of_every_type_are_cast(dtype: type) -> None:
    points = np.array([[1, 2, 3], [4, 5, 6]], dtype)
    assert load_point_cloud(points).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_half_precision_tensors_are_points() -> None:
    points = torch.tensor([[0.5, 1.0, -2.0]], requires_grad=True).bfloat16()
    assert load_point_cloud(points).tolist() == [[0.5, 1.0, -2.0]]


def test_the_input_is_neither_changed_nor_shared() -> None:
    points = cloud()
    before = points.copy()
    load_point_cloud(points, normalize=True)[:] = 9
    load_point_cloud(points)[:] = 9
    assert np.array_equal(points, before)


@pytest.mark.parametrize("format", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_byte_colours_of_ply_are_scaled_to_0_to_1(format: str) -> None:
    vertices = np.array([[1, 2, 3, 0, 51, 255], [4, 5, 6, 255, 0, 102]], np.float64)
    loaded = load_point_cloud(ply(vertices, format=format, colours="uchar"), channels=6)
    assert np.array_equal(loaded, np.float32([[1, 2, 3, 0, 0.2, 1], [4, 5, 6, 1, 0, 0.4]]))


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_text_files_of_other_systems_are_read(newline: bytes) -> None:
    assert np.array_equal(load_point_cloud(off(cloud(), []).replace(b"\n", newline)), cloud())
    assert np.array_equal(load_point_cloud(ply(cloud()).replace(b"\n", newline)), cloud())


def test_a_binary_body_that_starts_with_a_line_feed_is_not_cut() -> None:
    vertices = np.frombuffer(b"\n\n\n\n" * 6, "<f4").reshape(2, 3)
    assert np.array_equal(load_point_cloud(ply(vertices, format="binary_little_endian")), vertices)


def test_comments_and_blank_lines_of_off_are_passed_over() -> None:
    text = "\n# made by a test\n OFF # of\n\n# counts\n2 0\n1 2 3 # first\n\n4 5 6 7 8\n"
    assert load_point_cloud(text.encode()).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("first", ["OFF", "OFF ", "COFF\n", "STCNOFF\n", "# ModelNet\nOFF"])
def test_the_counts_may_follow_the_keyword_of_off_at_once(first: str) -> None:
    expected = load_point_cloud(off(), max_points=50)
    assert np.array_equal(load_point_cloud(off(first=first), max_points=50), expected)


# Drawing


def test_a_small_cloud_keeps_its_points_and_their_order() -> None:
    points = cloud(100)
    assert np.array_equal(load_point_cloud(points, max_points=100), points)


def test_of_a_large_cloud_so_many_different_points_are_drawn() -> None:
    points = cloud(500)
    drawn = load_point_cloud(points, max_points=200)
    assert len(np.unique(drawn, axis=0)) == 200
    assert {*map(tuple, drawn.tolist())} <= {*map(tuple, points.tolist())}
    assert np.array_equal(load_point_cloud(points, max_points=200), drawn)
    assert not np.array_equal(load_point_cloud(points, max_points=200, seed=1), drawn)


def test_every_point_is_drawn_as_often_as_any_other() -> None:
    points = np.arange(60.0).reshape(20, 3)
    counts = np.zeros(20)
    for seed in range(1000):
        counts[(load_point_cloud(points, max_points=5, seed=seed)[:, 0] / 3).astype(int)] += 1
    # Each is drawn with probability 1/4, so the standard deviation of a count is 13.7.
    assert np.abs(counts - 250).max() < 60


def test_the_draw_with_colours_has_the_places_of_the_draw_without() -> None:
    points = cloud(300, 6)
    coloured = load_point_cloud(points, channels=6, max_points=100)
    assert np.array_equal(coloured[:, :3], load_point_cloud(points, max_points=100))
    rows = {*map(tuple, points.tolist())}
    assert all(tuple(row) in rows for row in coloured.tolist())


FLOATS = st.floats(-1e6, 1e6, width=32)
# Few values, so that points coincide, in one coordinate or in all, and both zeros.
COARSE = st.sampled_from([-1.0, -0.0, 0.0, 1.0])
CLOUDS = st.integers(1, 30).flatmap(
    lambda points: arrays(np.float32, (points, 3), elements=FLOATS) | arrays(np.float32, (points, 3), elements=COARSE)
)


@given(CLOUDS, st.randoms(use_true_random=False), st.integers(1, 30), st.booleans())
def test_the_order_of_the_points_changes_no_bit_of_what_is_drawn(
    points: np.ndarray, random: Any, max_points: int, normalize: bool
) -> None:
    order = list(range(len(points)))
    random.shuffle(order)
    options = {"max_points": max_points, "normalize": normalize}
    one, other = (load_point_cloud(array, **options) for array in (points, points[order]))
    if max_points >= len(points):
        one = one[order]
    assert one.tobytes() == other.tobytes()


@given(CLOUDS)
def test_a_normalised_cloud_is_centred_and_reaches_a_norm_of_one(points: np.ndarray) -> None:
    normalized = load_point_cloud(points, normalize=True).astype(np.float64)
    if (points == points[0]).all():
        assert not normalized.any()
    else:
        assert np.abs(normalized.mean(axis=0)).max() < 1e-6
        assert np.linalg.norm(normalized, axis=1).max() == pytest.approx(1, abs=1e-6)


def test_normalising_is_that_of_the_definition() -> None:
    points = cloud(50).astype(np.float64) * [1, 2, 3] + [4, -5, 6]
    centred = points - points.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1).max()
    assert np.allclose(load_point_cloud(points, normalize=True), expected, atol=1e-7)


def test_normalising_leaves_colours_alone() -> None:
    points = cloud(20, 6)
    assert np.array_equal(load_point_cloud(points, channels=6, normalize=True)[:, 3:], points[:, 3:])


@pytest.mark.parametrize("place", [0.1, 1e9, 123456.7])
def test_a_cloud_of_one_place_becomes_zeros(place: float) -> None:
    assert not load_point_cloud(np.full((7, 3), place), normalize=True).any()
    assert not load_point_cloud([[place, 1, 2]], normalize=True).any()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-20, 1e8])
def test_clouds_of_any_size_are_normalised_alike(scale: float) -> None:
    points = cloud().astype(np.float64)
    expected = load_point_cloud(points, normalize=True)
    assert np.allclose(load_point_cloud(points * scale, normalize=True), expected, atol=1e-6)


def test_normalising_keeps_the_digits_of_a_cloud_far_from_the_origin() -> None:
    # As scans of landscapes have them, in metres.
    points = cloud().astype(np.float64)
    far = load_point_cloud(points + np.array([512_345.0, 5_412_345.0, 300.0]), normalize=True)
    assert np.allclose(far, load_point_cloud(points, normalize=True), atol=1e-6)


# Meshes


def square(format: str = "binary_little_endian") -> bytes:
    """A square of the plane, of colours that equal the coordinates, and far off a vertex without a face."""
    corners = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0], [50, 50, 50]], np.float32)
    return ply(np.hstack([corners, (corners / 2).clip(0, 1)]), [[0, 1, 2, 3]], format, "float")


def test_of_a_mesh_the_surface_is_sampled_evenly() -> None:
    points = load_point_cloud(square(), max_points=8000)
    assert points.shape == (8000, 3)
    assert not points[:, 2].any()
    cells = np.histogram2d(points[:, 0], points[:, 1], bins=(8, 4), range=((0, 2), (0, 1)))[0]
    assert cells.sum() == 8000
    # 250 a cell, with a standard deviation of 15.6.
    assert np.abs(cells - 250).max() < 70


def test_large_triangles_get_more_points_than_small_ones() -> None:
    vertices = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0], [9, 9, 1], [10, 9, 1], [9, 11, 1], [0, 0, 5]])
    points = load_point_cloud(off(vertices, [[6, 6, 0], [0, 1, 2], [3, 4, 5], [0, 6, 6]]), max_points=4000)
    assert np.count_nonzero(points[:, 2] == 0) == pytest.approx(3000, abs=140)
    assert np.count_nonzero(points[:, 2] == 1) == pytest.approx(1000, abs=140)


def test_colours_on_a_surface_lie_between_those_of_its_vertices() -> None:
    points = load_point_cloud(square(), channels=6, max_points=300)
    assert np.allclose(points[:, 3:], points[:, :3] / 2, atol=1e-6)


def test_the_seed_decides_on_the_points_of_a_surface() -> None:
    points = load_point_cloud(off(), max_points=20)
    assert np.array_equal(load_point_cloud(off(), max_points=20), points)
    assert not np.array_equal(load_point_cloud(off(), max_points=20, seed=1), points)


@pytest.mark.parametrize("faces", [TRIANGLES, [[0, 1, 2, 3]], [[0, 1, 2], [1, 2, 3, 0], [2, 3], [3, 0, 1]]])
def test_a_mesh_gives_the_same_points_in_every_format(faces: list[list[int]]) -> None:
    expected = load_point_cloud(off(faces=faces), max_points=30)
    for format in ("ascii", "binary_little_endian", "binary_big_endian"):
        assert np.array_equal(load_point_cloud(ply(TETRAHEDRON, faces, format), max_points=30), expected)


def test_polygons_are_cut_into_fans_of_triangles() -> None:
    pentagon = np.array([[0, 0, 0], [4, 0, 0], [4, 4, 0], [2, 6, 0], [0, 4, 0]])
    fan = [[0, 1, 2], [0, 2, 3], [0, 3, 4]]
    expected = load_point_cloud(off(pentagon, fan), max_points=40)
    assert np.array_equal(load_point_cloud(off(pentagon, [[0, 1, 2, 3, 4]]), max_points=40), expected)


def test_colours_of_the_faces_of_off_are_passed_over() -> None:
    coloured = off().replace(b"3 0 1 2\n", b"3 0 1 2 255 0 0\n")
    assert np.array_equal(load_point_cloud(coloured, max_points=10), load_point_cloud(off(), max_points=10))


def test_a_ply_with_no_face_in_it_is_a_cloud() -> None:
    assert np.array_equal(load_point_cloud(ply(cloud(), [])), cloud())


# What has no meaning


@pytest.mark.parametrize(
    "item",
    [
        None,
        5,
        np.zeros(3),
        np.zeros((4, 2)),
        np.zeros((3, 100)),
        torch.zeros(2, 4, 3),
        np.zeros((4, 3), complex),
        np.zeros((4, 3), bool),
        np.full((4, 3), "a"),
        np.full((4, 3), None),
        [["a", "b", "c"]],
        np.zeros(4, [("x", "f4"), ("y", "f4"), ("z", "f4")]),
    ],
    ids=[
        "none",
        "number",
        "flat",
        "2d",
        "transposed",
        "batch",
        "complex",
        "bool",
        "text",
        "object",
        "words",
        "record",
    ],
)
def test_an_array_of_a_wrong_kind(item: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected the point cloud as numbers \(points, 3\)"):
        load_point_cloud(item)


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected an array of equal rows"):
        load_point_cloud([[0, 0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"points": []}, r"hold xyz, bytes or a path, got the keys \['points'\]"),
        ({"xyz": cloud(channels=4)}, r"Expected 'xyz' of the point cloud as numbers \(points, 3\)"),
        ({"xyz": 5}, "Expected 'xyz' of"),
        ({"xyz": cloud(4), "rgb": cloud(5)}, "Expected 'rgb' of the point cloud.*a row for each"),
        ({"xyz": cloud(4), "rgb": ["red"] * 4}, "Expected 'rgb' of"),
    ],
)
def test_a_dict_of_a_wrong_kind(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_point_cloud(item, channels=6)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1.1e9, -1.1e9])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_coordinates_that_are_not_finite_or_too_large_are_refused(number: float, dtype: type) -> None:
    points = cloud().astype(dtype)
    with np.errstate(over="ignore"):
        points[7, 1] = number
    with pytest.raises(ValueError, match="Expected finite coordinates of at most 1e\\+09 in the point cloud, got"):
        load_point_cloud(points)


def test_no_points_are_refused() -> None:
    for item in (np.zeros((0, 3)), {"xyz": np.zeros((0, 3))}, npy(np.zeros((0, 3))), off(cloud(0), []), ply(cloud(0))):
        with pytest.raises(ValueError, match=r"Expected 1 to 10000000 points in the point cloud, got 0\."):
            load_point_cloud(item)


def test_more_points_than_ten_million_are_refused() -> None:
    for item in (np.broadcast_to(np.float32(0), (10_000_001, 3)), b"OFF\n10000001 0 0\n"):
        with pytest.raises(ValueError, match="Expected 1 to 10000000 points in the point cloud, got 10000001"):
            load_point_cloud(item)


@pytest.mark.parametrize(
    ("item", "got"),
    [
        (cloud(), "Expected colours in the point cloud for channels=6, got none"),
        (off(), "Expected colours in the point cloud for channels=6, got none"),
        (cloud(channels=5), "Expected colours in the point cloud for channels=6, got none"),
        (cloud(channels=6) * 255, "floats in 0..1, got float32 from .* to 2"),
        (-cloud(channels=6), "floats in 0..1, got float32 from -0"),
        (np.full((4, 6), np.nan) * [0, 0, 0, 1, 1, 1], "Expected finite coordinates"),
        (np.hstack([cloud(4), np.full((4, 3), np.nan)]), "floats in 0..1, got float64 from nan to nan"),
        (np.ones((4, 6), np.int64), "floats in 0..1, got int64 from 1 to 1. Divide"),
        ({"xyz": cloud(4), "rgb": np.full((4, 3), 255, np.uint8)}, "floats in 0..1, got uint8 from 255 to 255"),
    ],
)
def test_colours_that_are_missing_or_out_of_range(item: Any, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        load_point_cloud(item, channels=6)


@pytest.mark.parametrize("options", [{"channels": 4}, {"max_points": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected channels=3"):
        load_point_cloud(cloud(), **options)


# Damaged files


def header(shape: str = "(4, 3)", descr: str = "'<f4'") -> bytes:
    """The start of an .npy file, with nothing behind it."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"xyz 1 2 3", "not .npy, .npz, .ply or .off by its content"),
        (b"\x80\x04K\x01.", "pickles are not read"),
        (npy(cloud())[:-1], "damaged .it ends after 479 of 480 bytes"),
        (npy(cloud())[:40], "is damaged"),
        (header("(10**9, 3)"), "is damaged"),
        (header("(1000000000000, 3)"), "it ends after 0 of 12000000000000 bytes"),
        (header("(-1, 3)"), r"Expected point cloud .*cloud.npy' as numbers \(points, 3 or more\)"),
        (header("(3,)"), r"got float32 of shape \(3,\)"),
        (header("(4, 3)", "[('x', '<f4')]"), "Expected point cloud .*cloud.npy' as numbers"),
        (header("(4, 3)", "'<U8'"), "got <U8 of shape"),
        (header("(4, 3)", "'<c8'"), "got complex64 of shape"),
        (header("((" * 2000), "is damaged"),
        (npy(cloud(channels=2)), r"Expected point cloud .*cloud.npy' as numbers \(points, 3\)"),
        (npy(np.array({"xyz": 1}), allow_pickle=True), "python -m cmcr_hf.conversion.convert_openshape"),
        (b"\x93NUMPY\x03\x00" + header()[8:], "is damaged"),
        (npz(xyz=cloud())[:-30], "is damaged"),
        (npz(xyz=cloud(), rgb=cloud(3)), "Expected 'rgb' of point cloud .*cloud.npy"),
        (npz(xyz=np.array({"a": 1})), "Expected 'xyz' of point cloud .* got pickled objects"),
        (npz(xyz=np.array(["a"])), "Expected 'xyz' of point cloud"),
        (npz(a=cloud(), b=cloud()), r"Expected 'xyz' and perhaps 'rgb', or one array alone, .*\['a', 'b'\]"),
        (npz(), "or one array alone"),
        (off()[:-5], "a list of 3 numbers stands in a line of 2"),
        (off()[:-9], "it ends after 3 of 4 rows"),
        (off()[:20], "it ends after"),
        (b"OFF", "is damaged"),
        (b"OFF\n2\n0 0 0\n1 1 1\n", "is damaged"),
        (b"OFF\n2 0 0\n", "it ends before its 2 vertices"),
        (b"OFF\n-2 0 0\n", "Expected 1 to 10000000 points"),
        (b"OFF\n1 -2 0\n0 0 0\n", "Expected 1 to 10000000 faces"),
        (off().replace(b"1.0", b"one", 1), "is damaged"),
        (off().replace(b"1.0", b"nan", 1), "Expected finite coordinates"),
        (off().replace(b"1.0", b"", 1), "is damaged"),
        (off(faces=[[0, 1, 4]]), "its faces name the vertices 0 to 4 of 4"),
        (off(faces=[[0, 1, -1]]), "its faces name the vertices -1 to 1 of 4"),
        (off(faces=[[0, 1]]), "Expected 1 to 10000000 triangles in .*, got 0"),
        (off(faces=[[0, 1, 1]]), "Expected a surface with an area in point cloud .*cloud.npy'"),
        (b"4OFF\n1 0 0\n1 2 3 4\n", "got another OFF"),
        (b"nOFF\n1 0 0\n1 2 3 4\n", "got another OFF"),
        (b"OFF BINARY\n\0\0\0\x01", "got another OFF"),
        (b"OFF\n1 0 0\n" + b"1 2 3 " * 200_000, "a line has 1048576 characters"),
        (ply(cloud())[:100], "its header has no end"),
        (ply(cloud()).replace(b"format ascii 1.0\n", b""), "its header names no format"),
        (ply(cloud()).replace(b"ascii", b"asci"), "is damaged"),
        (ply(cloud()).replace(b"float x", b"real x"), "is damaged"),
        (ply(cloud()).replace(b"element edge", b"element vertex"), "its header holds 'element vertex 1'"),
        (ply(cloud()).replace(b"float x", b"float w"), r"its vertices have \['w', 'y', 'z'\]"),
        (ply(cloud()).replace(b"float x", b"list uchar float x"), "its vertices have"),
        (ply(TETRAHEDRON, TRIANGLES).replace(b"vertex_indices", b"corners"), r"its faces \['flag', 'corners'\]"),
        (ply(cloud()).replace(b"element edge", b"element tristrips"), "got strips of triangles"),
        (b"".join(ply(cloud()).splitlines(keepends=True)[:-2]), "it ends after 39 of 40 vertices"),
        (ply(cloud(), format="binary_little_endian")[:-20], "it ends before its 40 vertices do"),
        (ply(TETRAHEDRON, TRIANGLES, "binary_big_endian")[:-1], "is damaged"),
        (ply(TETRAHEDRON, TRIANGLES[:1]).replace(b"face 1", b"face 10000001"), "Expected 1 to 10000000 faces"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "cloud.npy"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_point_cloud(path)
    assert "cloud.npy" in str(caught.value)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "run",)

    for data in (npy(np.array([Hostile()]), allow_pickle=True), npz(xyz=np.array([Hostile()]))):
        with pytest.raises(ValueError, match="pickled objects, which can run code"):
            load_point_cloud(data)
    assert not (tmp_path / "run").exists()


def test_a_file_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = npy(cloud())
    monkeypatch.setattr(loading, "MAX_BYTES", len(data))
    load_point_cloud(data)
    with pytest.raises(ValueError, match=f"at most {len(data)} bytes, got {len(data) + 1}"):
        load_point_cloud(data + b"\0")


def bomb(compression: int, zeros: int = 2**21) -> bytes:
    """An .npz of points at the origin, which is small for what it holds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("xyz.npy", npy(np.zeros((zeros, 3), np.float16)))
    return buffer.getvalue()


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(loading, "MAX_BYTES", 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="to unpack to at most 1048576 bytes, got 12583040"):
        load_point_cloud(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_archive_that_understates_its_size_unpacks_no_more_than_it_says() -> None:
    data = bomb(zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", 12_583_040)
    assert data.count(size) == 2
    tracemalloc.start()
    with pytest.raises(ValueError, match="is damaged"):
        load_point_cloud(data.replace(size, struct.pack("<I", 200)))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_of_a_method_without_bounds_is_refused(compression: int) -> None:
    with pytest.raises(ValueError, match="'xyz' is compressed by method"):
        load_point_cloud(bomb(compression, 10))


SAMPLES = {
    "npy": npy(cloud(12)),
    "npz": npz(xyz=cloud(12), rgb=cloud(12)),
    "npz compressed": npz(np.savez_compressed, xyz=cloud(12)),
    "off": off(),
    "ply text": ply(TETRAHEDRON, TRIANGLES),
    "ply little": ply(TETRAHEDRON, TRIANGLES, "binary_little_endian"),
    "ply mixed": ply(TETRAHEDRON, [[0, 1, 2], [0, 1, 2, 3]], "binary_big_endian"),
}
EDITS = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
)


@pytest.mark.parametrize("name", SAMPLES)
@given(edits=EDITS)
def test_of_a_file_with_changed_bytes_come_points_or_a_value_error(
    name: str, edits: list[tuple[int, int, bytes]]
) -> None:
    data = SAMPLES[name]
    for place, removed, added in edits:
        place %= len(data) + 1
        data = data[:place] + added + data[place + removed :]
    try:
        points = load_point_cloud(data, max_points=16)
    except ValueError:
        return
    assert points.dtype == np.float32
    assert points.shape[1] == 3
    assert 1 <= len(points) <= 16
    assert np.isfinite(points).all()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_that_is_cut_off_is_refused(name: str) -> None:
    data = SAMPLES[name]
    # The last character of a text may be a line end or a digit of a number.
    for end in range(len(data) - 2):
        with pytest.raises(ValueError, match=r"point cloud"):
            load_point_cloud(data[:end])


def test_a_file_without_end_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read point cloud .*missing\.ply'.*Check the path"):
        load_point_cloud(tmp_path / "missing.ply")
    with pytest.raises(ValueError, match="pipe or device"):
        load_point_cloud("/dev/zero")


# Memory


@pytest.mark.parametrize("form", ["array", "npy", "ply"])
def test_a_cloud_of_a_million_points_takes_memory_in_proportion(form: str) -> None:
    points = np.random.default_rng(0).random((1_000_000, 3), dtype=np.float32)
    vertices = b"ply\nformat binary_little_endian 1.0\nelement vertex 1000000\n"
    vertices += b"property float x\nproperty float y\nproperty float z\nend_header\n" + points.tobytes()
    item = {"array": points, "npy": npy(points), "ply": vertices}[form]
    tracemalloc.start()
    drawn = load_point_cloud(item, normalize=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.shape == (10_000, 3)
    # The points themselves are 12 MB.
    assert peak < 120e6


def test_an_official_cloud_is_a_pickle_and_named_so(shared: Path) -> None:
    record = shared / "official" / "toilet.npy"
    with pytest.raises(ValueError, match=r"toilet\.npy' as plain numbers, got pickled objects"):
        load_point_cloud(record)
