# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""What reading images and reading audio share: files, bytes, arrays and tensors."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch

# What the readers of damaged files raise, depending on the format and the place.
DAMAGES = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


@contextmanager
def open_item(item: Any, kind: str) -> Iterator[tuple[BinaryIO | None, str]]:
    """Open the bytes behind a path, encoded bytes or a `datasets` dict.

    Gives a seekable stream, or `None` for what is none of these, and the item's name for error messages. A file is
    read as its reader asks for it, never whole.

    Raises:
        ValueError: a URL, a dict that holds neither bytes nor a path, a file that is missing, unreadable or a pipe.
    """
    path = getattr(item, "filename", None)
    if isinstance(item, Mapping):
        if item.get("bytes") is None and item.get("path") is None:
            raise ValueError(
                f"Expected the {kind} dict to hold an array (audio only), bytes or a path, got the keys {list(item)}."
            )
        path, item = item.get("path"), item["bytes"] if item.get("bytes") is not None else item["path"]
    if isinstance(item, (str, os.PathLike)):
        # A text that was taken for a path, such as an encoded image, has no end.
        name = f"{kind} {os.fspath(item)!r:.500}"
        with _open_file(item, name, kind) as file:
            yield file, name
        return
    name = f"{kind} {str(path)!r:.500}" if path else f"the {kind}"
    yield io.BytesIO(bytes(item)) if isinstance(item, (bytes, bytearray, memoryview)) else None, name


def _open_file(path: str | os.PathLike, name: str, kind: str) -> BinaryIO:
    location = os.fspath(path)
    if re.match(r"[a-z][a-z0-9+.-]+://", str(location), re.IGNORECASE):
        raise ValueError(f"Expected the {kind} as a local file, got the URL {location!r:.500}. Download it first.")
    try:
        mode = os.stat(path).st_mode
        # Opening a pipe would wait for its writer, and a device has no end.
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError("it is a pipe or device, not a file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot read {name}: {getattr(error, 'strerror', None) or error}. Check the path."
        ) from error


def to_numpy(value: Any) -> np.ndarray:
    """Return an array, tensor or nested list as an array on the CPU.

    Raises:
        ValueError: rows of unequal length, or a tensor without dense values.
    """
    try:
        if not isinstance(value, torch.Tensor):
            return np.asarray(value)
        value = value.detach().cpu()
        # numpy has no bfloat16.
        return (value.float() if value.is_floating_point() else value).numpy()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"Expected an array of equal rows, got {describe(value)} ({error}).") from error


def describe(value: Any) -> str:
    """Name the type of a value for an error message, and of an array also dtype and shape."""
    shape = (
        f" of {value.dtype} and shape {tuple(value.shape)}"
        if hasattr(value, "shape") and hasattr(value, "dtype")
        else ""
    )
    return type(value).__name__ + shape
