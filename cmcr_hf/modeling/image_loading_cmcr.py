# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any kind as RGB, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch

from .loading_cmcr import DAMAGES, describe, open_item, to_numpy

# Above this number, pillow itself warns of decompression bombs; it holds so many in 0.4 GB.
MAX_PIXELS = 89_478_485
# MAX_PIXELS take less in any format.
MAX_BYTES = 2**30
_LIMIT = f"1 to {MAX_PIXELS} pixels"
_REMEDY = "Save it smaller, or as a baseline JPEG file, which may be larger."
# What pillow raises on damaged files, depending on the format and the place.
_DAMAGES = (*DAMAGES, AttributeError)


def load_image(image: Any) -> Any:
    """Read an image as an RGB PIL image: a PIL image, path, encoded bytes, `datasets` dict, or an array or tensor.

    Arrays and tensors are `(height, width)`, `(height, width, 1 or 3)` or `(1 or 3, height, width)`, uint8 in 0..255
    or floats in 0..1; where both fit, channels come last in an array and first in a tensor.

    The content of a file decides on its format, whatever its name; its first frame or page counts. The orientation
    that a camera recorded (EXIF) is applied where it is readable. Transparency is dropped, 16 bits are cut to 8,
    colour profiles (ICC) are not applied. A baseline JPEG file of more than 89478485 pixels is decoded at a half, a
    quarter or an eighth of its size.

    Raises:
        ValueError: the file is missing, damaged, no image or larger than 1 GiB; the image is empty or has more than
            89478485 pixels; the array has another shape or range.
    """
    pillow = _pillow()
    # Pillow warns of metadata that leave the pixels as they are, and of sizes that are an error here.
    with open_item(image, "image") as (stream, name), warnings.catch_warnings(action="ignore"):
        if stream is not None:
            # Some formats are read into memory whole.
            if stream.seek(0, 2) > MAX_BYTES:
                size = stream.tell()
                raise ValueError(f"Expected {name} with at most {MAX_BYTES} bytes, got {size}. Save it smaller.")
            with _naming(name):
                picture = _open(stream)
        elif isinstance(image, pillow.Image.Image):
            picture = image
        else:
            return pillow.Image.fromarray(_pixels(image, name))
        width, height = picture.size
        _check_size(width, height, name)
        if picture.format == "EPS":
            # Pillow would run Ghostscript on it.
            raise ValueError(f"Expected {name} as pixels, got a PostScript program. Convert it to PNG.")
        with _naming(name):
            picture.load()
            picture = _upright(picture)
            if picture.mode.startswith("I;16"):
                # `convert` clips, so all but the darkest 16-bit greys would be white.
                picture = pillow.Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode == "RGB" and picture.format in ("JPEG", "PNG") and picture is not image:
                # Decoded here, and with no other frames to read from the file.
                return picture
            if picture.mode not in ("I", "F", "La"):
                return picture.convert("RGB")
    raise ValueError(
        f"Expected {name} with 8 or 16 bits a channel, got pillow's mode {picture.mode!r}. Convert it to 'L' or 'RGB'."
    )


def _check_size(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"Expected {name} with {_LIMIT}, got {width} x {height}. {_REMEDY}")


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.JpegImagePlugin
    except ImportError as error:
        raise ImportError("Images need pillow: pip install pillow") from error
    return PIL


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn what pillow raises into a ValueError that names the image."""
    pillow = _pillow()
    try:
        yield
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"Cannot read {name}: it is empty, no image, or in a format that pillow lacks.") from error
    except pillow.Image.DecompressionBombError as error:
        raise ValueError(f"Expected {name} with {_LIMIT}, got more ({str(error).split(',')[0]}). {_REMEDY}") from error
    except _DAMAGES as error:
        raise ValueError(f"Cannot read {name}: it is damaged ({error}).") from error


def _open(stream: BinaryIO) -> Any:
    stream.seek(0)
    start = stream.read(3)
    stream.seek(0)
    return _open_jpeg(stream) if start == b"\xff\xd8\xff" else _pillow().Image.open(stream)


def _open_jpeg(stream: BinaryIO) -> Any:
    """Open a JPEG, and have one of more than `MAX_PIXELS` decoded at a fraction of its size."""
    # Image.open would refuse a large one by its full size.
    picture = _pillow().JpegImagePlugin.JpegImageFile(stream)
    width, height = picture.size
    if width * height > MAX_PIXELS and not picture.info.get("progressive"):
        # Pillow has read the header of the first scan: its length, its components, three bytes more.
        stream.seek(-6 - 2 * picture.layers, 1)
        # libjpeg holds the coefficients of all pixels where a scan does not hold all components.
        if stream.read(3) == bytes([0, 6 + 2 * picture.layers, picture.layers]):
            fraction = next(part for part in (2, 4, 8) if width * height <= MAX_PIXELS * part**2)
            picture.draft(None, (width // fraction, height // fraction))
    return picture


def _upright(picture: Any) -> Any:
    """Return the image turned and mirrored as its EXIF orientation says, or as it is without a readable one."""
    turns = _pillow().Image.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        method = methods.get(picture.getexif().get(0x0112))
    except _DAMAGES:
        return picture
    if method is None:
        return picture
    picture = picture.transpose(method)
    # Read again, they would turn it once more.
    picture.info = {}
    return picture


def _pixels(image: Any, name: str) -> np.ndarray:
    array = to_numpy(image)
    axes = (0, 2) if isinstance(image, torch.Tensor) else (2, 0)
    fits = [axis for axis in axes if array.ndim == 3 and array.shape[axis] in (1, 3)]
    if array.ndim == 2:
        array, fits = array[:, :, None], [2]
    if not fits or 0 in array.shape:
        raise ValueError(
            "Expected a PIL image, path, bytes or array (height, width), (height, width, 3) or (3, height, width), "
            f"got {describe(image)}. Pass a batch as a list."
        )
    height, width = (size for axis, size in enumerate(array.shape) if axis != fits[0])
    _check_size(width, height, name)
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            span = f" from {array.min()} to {array.max()}" if array.dtype.kind in "fiu" else ""
            raise ValueError(f"Expected image values as uint8 in 0..255 or floats in 0..1, got {array.dtype}{span}.")
        array = np.rint(array * 255).astype(np.uint8)
    array = np.moveaxis(array, fits[0], 2)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
