import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cmcr_hf.conversion.convert_openshape as conversion
from cmcr_hf.conversion.convert_openshape import main, read_record
from cmcr_hf.modeling.point_cloud_loading_cmcr import load_point_cloud


def record(**parts: Any) -> dict[str, Any]:
    """A record with the parts that OpenShape's have, of random numbers."""
    random = np.random.default_rng(0)
    return {
        "id": "b3d1",
        "text": ["Toilette ü"],
        "text_feat": [{"original": random.random((1, 8), np.float32)}],
        "xyz": (random.random((50, 3)) - 0.5).astype(np.float16),
        "rgb": random.random((50, 3)).astype(np.float16),
        "rows": 50,
        "score": -0.25,
        **parts,
    }


def npy(content: Any, protocol: int = 4) -> bytes:
    """An .npy file of one object, as numpy writes it, but for the protocol."""
    array = np.empty((), object)
    array[()] = content
    return header() + pickle.dumps(array, protocol)


def header() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    return buffer.getvalue()


def put(folder: Path, data: bytes) -> Path:
    path = folder / "record.npy"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_points_and_colours_are_read_bit_by_bit(tmp_path: Path, protocol: int) -> None:
    read = read_record(put(tmp_path, npy(record(), protocol)))
    expected = record()
    assert [*read] == ["xyz", "rgb"]
    for key, array in read.items():
        assert array.dtype == np.float16
        assert np.array_equal(array, expected[key])


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_the_names_of_old_and_new_numpy_are_read(tmp_path: Path, core: bytes) -> None:
    data = npy(record(), 3).replace(b"numpy._core", core).replace(b"numpy.core", core)
    assert core + b".multiarray" in data
    assert np.array_equal(read_record(put(tmp_path, data))["xyz"], record()["xyz"])


@pytest.mark.parametrize(
    "xyz",
    [
        np.asfortranarray(np.arange(12.0).reshape(4, 3)),
        np.arange(12, dtype=">f4").reshape(4, 3),
        np.arange(12, dtype=np.int8).reshape(4, 3),
        np.arange(24.0).reshape(4, 6)[:, ::2],
    ],
    ids=["fortran order", "big endian", "integers", "strided"],
)
def test_arrays_of_every_layout_are_read(tmp_path: Path, xyz: np.ndarray) -> None:
    read = read_record(put(tmp_path, npy({"xyz": xyz})))
    assert [*read] == ["xyz"]
    assert np.array_equal(read["xyz"], xyz)


def test_a_record_may_lack_colours(tmp_path: Path) -> None:
    for parts in (record(rgb=None), {"xyz": record()["xyz"]}):
        assert [*read_record(put(tmp_path, npy(parts)))] == ["xyz"]


def test_the_command_writes_what_the_loader_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, npy(record()))
    target = tmp_path / "made" / "clouds" / "record.npz"
    assert main([str(path), "--output", str(target.parent)]) == 0
    assert capsys.readouterr().out == f"{target}: 50 points, coloured\n"
    expected = np.hstack([record()["xyz"], record()["rgb"]])
    assert np.array_equal(load_point_cloud(target, channels=6), expected.astype(np.float32))
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == ["xyz.npy", "rgb.npy"]
    assert sorted(item.name for item in target.parent.iterdir()) == ["record.npz"]


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    path = put(tmp_path, npy(record()))
    for folder in ("one", "two"):
        main([str(path), "--output", str(tmp_path / folder)])
    assert (tmp_path / "one" / "record.npz").read_bytes() == (tmp_path / "two" / "record.npz").read_bytes()


def test_one_bad_file_does_not_keep_the_others_from_being_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, missing = tmp_path / "good.npy", tmp_path / "bad.npy", tmp_path / "missing.npy"
    good.write_bytes(npy(record()))
    bad.write_bytes(npy(record())[:300])
    out = tmp_path / "out"
    assert main([str(bad), str(missing), str(good), "--output", str(out)]) == 1
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["convert_openshape"] * 2
    assert str(bad) in printed.err
    assert f"Cannot convert {missing}: No such file or directory" in printed.err
    assert [path.name for path in out.iterdir()] == ["good.npz"]


def test_two_files_of_one_name_are_not_written_over_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, xyz in (("one", np.zeros((1, 3))), ("two", np.ones((1, 3)))):
        (tmp_path / folder).mkdir()
        put(tmp_path / folder, npy({"xyz": xyz}))
    files = [str(tmp_path / folder / "record.npy") for folder in ("one", "two")]
    assert main([*files, "--output", str(tmp_path)]) == 1
    assert f"{files[0]} becomes record.npz too" in capsys.readouterr().err
    assert load_point_cloud(tmp_path / "record.npz").tolist() == [[0, 0, 0]]


def test_help_teaches_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "python -m cmcr_hf.conversion.convert_openshape assets/*.npy --output clouds" in text
    assert "Nothing of a pickle is run" in text


# Hostile pickles


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


def short(text: str) -> bytes:
    """The step of a pickle that gives a text."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


# Names from the memo: "os" and "system" are stored, other texts pushed, and both fetched for STACK_GLOBAL.
FROM_MEMO = b"\x80\x04" + short("system") + b"\x94" + short("os") + b"\x94" + short("x") + b"00h\x01h\x00\x93" + b"."
# An attribute of an allowed name.
ATTRIBUTE = b"\x80\x04" + short("numpy") + short("core.multiarray._reconstruct.__globals__") + b"\x93."


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (npy(Call(os.system, "true")), f"{os.system.__module__}.system"),
        (npy(Call(os.system, "true"), 3), f"{os.system.__module__}.system"),
        (npy(record(extra=Call(eval, "1"))), "builtins.eval"),
        (header() + pickle.dumps(Call(eval, "1"), 2), "__builtin__.eval"),
        (npy(record(xyz=Call(np.load, "file"))), "numpy.load"),
        (npy({"xyz": Call(np.fromfile, "file")}), "numpy.fromfile"),
        (npy(record(score=np.float64(1))), f"{np.float64(1).__reduce__()[0].__module__}.scalar"),
        (npy(record(file=Path("x"))), f"{type(Path()).__module__}.{type(Path()).__name__}"),
        (header() + b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (header() + b"(S'true'\nios\nsystem\n.", "takes the step STRING"),
        (header() + b"(ios\nsystem\n.", "os.system"),
        (header() + FROM_MEMO, "takes the step POP"),
        (header() + FROM_MEMO.replace(b"00", b""), "os.system"),
        (header() + ATTRIBUTE, "numpy.core.multiarray._reconstruct.__globals__"),
        (header() + b"\x80\x04cnumpy ndarray\nx\n.", "numpy.ndarray.x"),
        (header() + b"\x80\x02\x82\x01.", "takes the step EXT1"),
        (header() + b"\x80\x05\x97.", "takes the step NEXT_BUFFER"),
    ],
)
def test_a_pickle_that_names_anything_but_arrays_is_refused_by_that_name(
    tmp_path: Path, content: bytes, name: str
) -> None:
    with pytest.raises(ValueError, match=r"Cannot convert .*record\.npy: its pickle .* Do not load it\.") as caught:
        read_record(put(tmp_path, content))
    assert name in str(caught.value)


def test_nothing_of_a_hostile_pickle_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "run"
    path = put(tmp_path, npy(record(extra=Call(Path.touch, marker))))
    np.load(path, allow_pickle=True)
    assert marker.exists(), "the pickle does run where it is loaded"
    marker.unlink()
    assert main([str(path), "--output", str(tmp_path / "out")]) == 1
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def forged(code: bytes, shape: bytes, content: bytes) -> bytes:
    """A record whose `xyz` has this type, shape and content, as steps of a pickle."""
    reconstruct, ndarray, dtype = b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
    made = reconstruct + b"(" + ndarray + b"K\x00\x85C\x01btR"
    kind = dtype + b"(" + code + b"\x89\x88tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    xyz = made + b"(K\x01" + shape + kind + b"\x89" + content + b"tb"
    inner = b"}X\x03\x00\x00\x00xyz" + xyz + b"s"
    return header() + b"\x80\x03" + made + b"(K\x01)" + kind + b"\x89]" + inner + b"atb."


F4 = b"X\x02\x00\x00\x00f4"


def test_a_forged_record_is_read_where_it_is_sound(tmp_path: Path) -> None:
    content = np.float32([[1, 2, 3]]).tobytes()
    data = forged(F4, b"K\x01K\x03\x86", b"C" + bytes([len(content)]) + content)
    assert read_record(put(tmp_path, data))["xyz"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("code", "shape", "content"),
    [
        (F4, b"K\x01K\x03\x86", b"C\x04abcd"),
        (F4, b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"C\x04abcd"),
        (F4, b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86", b"C\x0c" + b"\0" * 12),
        (F4, b"K\x01K\x03\x86", b"]"),
        (F4, b"K\x01X\x01\x00\x00\x00a\x86", b"C\x00"),
        (b"X\x02\x00\x00\x00O8", b"K\x01K\x03\x86", b"C\x18" + b"A" * 24),
        (b"X\x02\x00\x00\x00V4", b"K\x01K\x03\x86", b"C\x0c" + b"A" * 12),
        (b"X\x03\x00\x00\x003f4", b"K\x01\x85", b"C\x0c" + b"A" * 12),
        (b"K\x04", b"K\x01K\x03\x86", b"C\x0c" + b"A" * 12),
    ],
    ids=["short", "huge", "negative", "list", "word", "objects", "raw", "nested", "number"],
)
def test_a_forged_array_is_refused(tmp_path: Path, code: bytes, shape: bytes, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"Cannot convert .*record\.npy"):
        read_record(put(tmp_path, forged(code, shape, content)))


BOMBS = {
    # A slot of the memo far out, for which loading would take memory.
    "memo": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "expected a pickled dict"),
    # Contents of 2**62 bytes.
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "expected 4611686018427387904 bytes"),
    "bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b".", "expected 4611686018427387904 bytes"),
    # A tuple that holds each former one twice, as the key of a dict.
    "key": (b"\x80\x02}(" + b"K\x00" + b"".join(b"q\x01h\x01\x86" for _ in range(300)) + b"K\x00u.", "no texts"),
    "steps": (b"\x80\x02" + b"N" * 100_001 + b".", "at most 100000 steps"),
    "digits": (b"I" + b"9" * 5000 + b"\n.", "Cannot convert"),
    "no end": (b"\x80\x02K\x01", "Cannot convert"),
    "empty stack": (b"\x80\x02R.", "is damaged"),
    "no mark": (b"\x80\x02t.", "is damaged"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_take_memory_or_time_without_end_is_refused(tmp_path: Path, bomb: str) -> None:
    steps, message = BOMBS[bomb]
    with pytest.raises(ValueError, match=message):
        read_record(put(tmp_path, header() + steps))


@given(
    edits=st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 3), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_of_a_record_with_changed_bytes_come_points_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    data = npy(record(xyz=np.zeros((2, 3), np.float16), rgb=np.zeros((2, 3), np.float16)))
    for place, removed, added in edits:
        place %= len(data) + 1
        data = data[:place] + added + data[place + removed :]
    try:
        arrays = read_record(put(tmp_path_factory.getbasetemp(), data))
    except ValueError:
        return
    assert arrays["xyz"].shape[1] == 3


# Other files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged|Cannot convert"),
        (b"\x80\x04K\x01.", "Cannot convert"),
        (npy(record())[:-1], "Cannot convert"),
        (npy([1, 2]), "expected a pickled dict with xyz"),
        (npy({"points": np.zeros((2, 3))}), "expected a pickled dict with xyz"),
        (npy({"xyz": [[1, 2, 3]]}), "is damaged"),
        (npy({"xyz": None}), "hold xyz"),
        (npy({"xyz": np.zeros((2, 2))}), r"Expected 'xyz' of the point cloud as numbers \(points, 3\)"),
        (npy({"xyz": np.full((2, 3), np.nan)}), "Expected finite coordinates"),
        (npy({"xyz": np.zeros((2, 3)), "rgb": np.full((2, 3), 7.0)}), "floats in 0..1"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_record(put(tmp_path, data))
    assert str(tmp_path / "record.npy") in str(caught.value)


def test_plain_points_need_no_conversion(tmp_path: Path) -> None:
    np.save(tmp_path / "record.npy", np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"got float64 of shape \(4, 3\)\. Use it as it is"):
        read_record(tmp_path / "record.npy")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, npy(record()))
    monkeypatch.setattr(conversion, "MAX_BYTES", path.stat().st_size)
    read_record(path)
    monkeypatch.setattr(conversion, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(ValueError, match="expected a file of at most"):
        read_record(path)
    with pytest.raises(ValueError, match="expected a file of at most"):
        read_record("/dev/zero")


@pytest.mark.parametrize("name", ["toilet", "BBQ", "train"])
def test_the_official_clouds_are_converted(shared: Path, tmp_path: Path, name: str) -> None:
    path = shared / "official" / f"{name}.npy"
    assert main([str(path), "--output", str(tmp_path)]) == 0
    expected = np.load(path, allow_pickle=True).item()
    loaded = load_point_cloud(tmp_path / f"{name}.npz", channels=6)
    assert loaded.shape == (10_000, 6)
    assert np.array_equal(loaded, np.hstack([expected["xyz"], expected["rgb"]]).astype(np.float32))
