"""Regions of pictures, cut out to be embedded as pictures by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..modeling.image_loading_cmcr import load_image
from ..training.data import Item, Items, Part


class Regions(Items):
    """Regions of pictures as items, those of one picture behind those of another.

    Args:
        names: of the pictures, below the folder.
        boxes: of each picture, `(n, 4)` in parts of it.
    """

    def __init__(self, names: Sequence[str], folder: Path, boxes: Sequence[np.ndarray]) -> None:
        self.modality = "image"
        self.boxes = boxes
        # The first row of each picture, and the end of the last.
        self.starts: list[int] = np.cumsum([0, *map(len, boxes)]).tolist()
        self._names, self._folder = names, folder
        self._pictures = Items.listed("image", names, folder).fingerprint

    @property
    def fingerprint(self) -> str:
        """Identify the pictures and their boxes."""
        digest = hashlib.sha256(f"{self._pictures} {self.starts}".encode())
        for found in self.boxes:
            digest.update(found.astype("<f8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[Item]:
        return self._read(0, len(self), 0)

    def parts(self, rows: int) -> list[Part]:
        """Return stretches of `rows` regions."""
        stops = [min(first + rows, len(self)) for first in range(0, len(self), rows)]
        return [
            Part(number, stop - number * rows, partial(self._read, number * rows, stop))
            for number, stop in enumerate(stops)
        ]

    def _read(self, first: int, stop: int, start: int) -> Iterator[Item]:
        row = first + start
        picture = int(np.searchsorted(self.starts, row, side="right")) - 1
        while row < stop:
            name, boxes = self._names[picture], self.boxes[picture]
            try:
                whole = load_image(self._folder / name)
            except ValueError:
                whole = None
            for place in range(row - self.starts[picture], min(len(boxes), stop - self.starts[picture])):
                # Of a picture that cannot be read, the file itself: whoever prepares it says why, and of which item.
                region = self._folder / name if whole is None else cut_square(whole, boxes[place])
                yield Item(f"{name} {place}", region)
                row += 1
            picture += 1


def cut_square(picture: Any, box: np.ndarray) -> Any:
    """Return a region of a picture, squeezed into a square of about its area, of one pixel at least.

    As in ViLD (arXiv 2104.13921): the image processor of CLIP would cut the ends off a region longer than wide.
    """
    size = np.array(picture.size)
    first = np.minimum(np.floor(box[:2] * size), size - 1)
    last = np.maximum(np.ceil(box[2:] * size), first + 1)
    width, height = (int(side) for side in last - first)
    side = max(round((width * height) ** 0.5), 1)
    # Cut first: `resize` with a box would look at what is around it.
    return picture.crop((*first.tolist(), *last.tolist())).resize((side, side), Image.Resampling.BICUBIC)
