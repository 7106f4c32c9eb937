"""Rewrite records of OpenShape without pickle: `python -m cmcr_hf.conversion.convert_openshape --help`.

Layout: an .npy file holds a 0-d object array, which numpy pickles: a dict with `xyz` and `rgb`, (10000, 3) float16,
beside texts and features of other models. A pickle can run any code where it is loaded, so this one is read as data:
no name in it is looked up, nothing in it is called, and arrays are made here of their bytes.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cmcr_hf.conversion.pickles import Call, read_pickle
from cmcr_hf.durable import write_durably
from cmcr_hf.modeling.point_cloud_loading_cmcr import ARRAY_DAMAGES, load_point_cloud, read_npy_header

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
    found = read_pickle(data[stream.tell() :], GLOBALS, max_steps=MAX_STEPS)
    # A 0-d array of objects: its state ends with the list of the only one.
    record = found.state[4][0] if isinstance(found, Call) else None
    if not isinstance(record, dict) or "xyz" not in record:
        raise ValueError("expected a pickled dict with xyz, got another object. Save its points with np.savez.")
    return record


def _array(value: Any) -> np.ndarray:
    """Make the array of numbers that a pickle describes."""
    _, shape, kind, fortran_order, content = value.state
    (code, *_), (_, order, *_) = kind.arguments, kind.state
    if (
        not value.name.endswith(" _reconstruct")
        or kind.name != "numpy dtype"
        or not re.fullmatch(r"[<>|][fiu][1248]", order + code)
    ):
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
