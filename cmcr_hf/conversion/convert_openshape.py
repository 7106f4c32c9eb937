"""Rewrite records of OpenShape without pickle: `python -m cmcr_hf.conversion.convert_openshape --help`.

Layout: an .npy file holds a 0-d object array, which numpy pickles: a dict with `xyz` and `rgb`, (10000, 3) float16,
beside texts and features of other models. A pickle can run any code where it is loaded, so this one is read as data:
no name in it is looked up, nothing in it is called, and arrays are made here of their bytes.
"""

from __future__ import annotations

import argparse
import io
import math
import pickletools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..durable import write_durably
from ..modeling.point_cloud_loading_cmcr import ARRAY_DAMAGES, load_point_cloud, read_npy_header

# A record takes some hundred kilobytes and a thousand steps.
MAX_BYTES = 2**28
MAX_STEPS = 100_000

# All that numpy's pickles of arrays name.
GLOBALS = {
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
}
# Steps of a pickle that give their argument as it stands.
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass
class _Global:
    name: str


@dataclass
class _Object:
    """What a pickle makes by calling a name, and the state that it then gives it."""

    name: str
    arguments: tuple
    state: Any = None


def read_record(path: str | Path) -> dict[str, np.ndarray]:
    """Read a record of OpenShape: `xyz` and, where it has colours, `rgb`, `(points, 3)` each, in their own precision.

    Raises:
        ValueError: the file is missing, damaged, larger than 256 MiB or no such record; its pickle names anything but
            what numpy's arrays need; the points are none of [`load_point_cloud`].
    """
    path = Path(path)
    try:
        # A pipe or a device has no end.
        if path.stat().st_size > MAX_BYTES or not path.is_file():
            raise ValueError(f"expected a file of at most {MAX_BYTES} bytes.")
        record = _record(path.read_bytes())
        parts = {key: record[key] for key in ("xyz", "rgb") if record.get(key) is not None}
        arrays: dict[str, np.ndarray] = {key: _array(part) for key, part in parts.items()}
        load_point_cloud(arrays, channels=6 if "rgb" in arrays else 3)
    except OSError as error:
        raise ValueError(f"Cannot convert {path}: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise ValueError(f"Cannot convert {path}: {error!s:.400}") from error
    except (*ARRAY_DAMAGES, AttributeError) as error:
        raise ValueError(f"Cannot convert {path}: it is damaged ({error!s:.200}). Copy it again.") from error
    return arrays


def _record(data: bytes) -> dict[str, Any]:
    stream = io.BytesIO(data)
    shape, _, dtype = read_npy_header(stream)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"expected one pickled object, got {dtype!s:.80} of shape {shape!s:.80}. Use it as it is.")
    found = _unpickle(data[stream.tell() :])
    # A 0-d array of objects: its state ends with the list of the only one.
    record = found.state[4][0] if isinstance(found, _Object) else None
    if not isinstance(record, dict) or "xyz" not in record:
        raise ValueError("expected a pickled dict with xyz, got another object. Save its points with np.savez.")
    return record


def _unpickle(data: bytes) -> Any:
    """Return what a pickle says, with an `_Object` in place of all that loading it would make by calls.

    Raises:
        ValueError: it names anything but `GLOBALS`, takes a step that arrays do not need, or more steps than allowed.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        mark = marks.pop()
        values = stack[mark:]
        del stack[mark:]
        return values

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_STEPS:
            raise ValueError(f"expected a pickle of at most {MAX_STEPS} steps, got more. Do not load it.")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                marks.append(len(stack))
            case name if name in VALUES:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            case "APPEND" | "APPENDS" as name:
                items = [stack.pop()] if name == "APPEND" else since_mark()
                _extend(stack[-1], items)
            case "SETITEM" | "SETITEMS" as name:
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
                _update(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "INST":
                stack.append(_global(argument))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join([stack.pop(-2), stack.pop()])))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_Object(called.name, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case name:
                raise ValueError(f"its pickle takes the step {name}, which arrays do not need. Do not load it.")
    raise ValueError("its pickle has no end. Copy it again.")


def _extend(values: Any, items: list[Any]) -> None:
    if not isinstance(values, list):
        raise TypeError("items for what is no list")
    values.extend(items)


def _update(values: Any, items: list[Any]) -> None:
    # A tuple of tuples, each twice in the next, would take forever to be a key.
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in items[::2]):
        raise TypeError("keys that are no texts")
    values.update(zip(items[::2], items[1::2], strict=True))


def _global(name: str) -> _Global:
    if name not in GLOBALS:
        raise ValueError(
            f"its pickle names {name.replace(' ', '.')!r:.200}, which arrays do not need. Do not load it."
        )
    return _Global(name.split()[1])


def _array(value: Any) -> np.ndarray:
    """Make the array of numbers that a pickle describes."""
    _, shape, kind, fortran_order, content = value.state
    (code, *_), (_, order, *_) = kind.arguments, kind.state
    if (value.name, kind.name) != ("_reconstruct", "dtype") or not re.fullmatch(r"[<>|][fiu][1248]", order + code):
        raise ValueError(f"expected arrays of numbers, got {code!r:.80}. Save the points with np.savez.")
    dtype = np.dtype(order + code)
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * dtype.itemsize:
        raise TypeError(f"no {math.prod(shape)} numbers of {dtype}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 1 after a line on each file that could not be converted."""
    parser = argparse.ArgumentParser(
        prog="python -m cmcr_hf.conversion.convert_openshape",
        description="Rewrite point clouds of OpenShape and of the official C-MCR demo, which are pickled .npy files, "
        "as .npz files that hold `xyz` and, where there are colours, `rgb`. Nothing of a pickle is run.",
        epilog="For example: `python -m cmcr_hf.conversion.convert_openshape assets/*.npy --output clouds` writes "
        "clouds/toilet.npz for assets/toilet.npy. CMCRProcessor and recipes take it as a point cloud. Texts and "
        "features of a record are left out, and a file of that name in the output folder is replaced.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a record, as .npy")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for the .npz files, made where it is missing"
    )
    arguments = parser.parse_args(argv)
    targets: dict[Path, Path] = {}
    status = 0
    for path in arguments.files:
        target = arguments.output / f"{path.stem}.npz"
        try:
            if targets.setdefault(target, path) != path:
                raise ValueError(f"Cannot convert {path}: {targets[target]} becomes {target.name} too. Rename one.")
            arrays = read_record(path)
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]  # taken for allow_pickle
            arguments.output.mkdir(parents=True, exist_ok=True)
            write_durably(target, buffer.getvalue())
        except (ValueError, OSError) as error:
            print(f"convert_openshape: {' '.join(str(error).split())}", file=sys.stderr)
            status = 1
        else:
            print(f"{target}: {len(arrays['xyz'])} points{', coloured' if 'rgb' in arrays else ''}")
    return status


if __name__ == "__main__":
    sys.exit(main())
