"""Regions of a picture in which something may sound: a grid of boxes, or what an object detector finds.

Both know neither the sound nor its class.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from ..durable import write_durably
from ..modeling.image_loading_cmcr import load_image
from ..training.data import Items
from ..training.embed import source_record
from .boxes import suppress_overlaps

SIDES = (1, 2 / 3, 1 / 2, 1 / 3)
MAX_ASPECT = 2
# Of a detector's objects, whichever class they are given: the least score, and how many at most.
MIN_SCORE = 0.05
MAX_OBJECTS = 50


def grid_boxes() -> np.ndarray:
    """Return boxes on several scales, `(111, 4)` in parts of the picture, first the whole of it.

    Width and height are 1, 2/3, 1/2 or 1/3 of those of the picture, neither part more than twice the other. Boxes of
    a kind lie half of their side or less apart, from edge to edge.
    """
    boxes = []
    for width, height in itertools.product(SIDES, SIDES):
        if max(width, height) > MAX_ASPECT * min(width, height) + 1e-9:
            continue
        for top, left in itertools.product(_starts(height), _starts(width)):
            boxes.append((left, top, left + width, top + height))
    return np.array(boxes).clip(0, 1)


def _starts(side: float) -> np.ndarray:
    # Rounded, since 1 - 2/3 is a little more than half of 2/3.
    return np.linspace(0, 1 - side, 1 + int(np.ceil(round((1 - side) / (side / 2), 9))))


class Detector:
    """An object detector of transformers that proposes the regions of a picture, best first.

    Pictures go through it one by one, so that the padding of a batch changes nothing. What it finds counts whatever
    its class and down to a score of 0.05, overlapping boxes (IoU above 0.7) once, 50 at most; then the whole picture.

    Args:
        name: folder or Hub id of a model of `AutoModelForObjectDetection`, such as `facebook/detr-resnet-50`.

    Raises:
        ValueError: there is no such detector.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            self._model: Any = AutoModelForObjectDetection.from_pretrained(name).to(device).eval()
            self._processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"Cannot load the detector {name!r}: {' '.join(str(error).split())[:300]} Pass a folder or Hub id of "
                "AutoModelForObjectDetection, such as facebook/detr-resnet-50, or locate on a grid without one."
            ) from error
        # By which another detector is noticed.
        self.record = source_record(name, getattr(self._model.config, "_commit_hash", None), self._model)

    @torch.inference_mode()
    def boxes(self, image: Any) -> np.ndarray:
        """Return the boxes of a picture (see [`load_image`]), `(n, 4)` float64 in parts of it."""
        inputs = self._processor(load_image(image), return_tensors="pt").to(self._model.device)
        (found,) = self._processor.post_process_object_detection(self._model(**inputs), threshold=MIN_SCORE)
        order = found["scores"].argsort(descending=True, stable=True)
        boxes = found["boxes"][order].cpu().double().numpy().clip(0, 1)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
        return np.concatenate([boxes[suppress_overlaps(boxes)[:MAX_OBJECTS]], [[0, 0, 1, 1]]])


def propose(
    detector: Detector, names: Sequence[str], folder: Path, path: Path, *, progress: bool = True
) -> list[np.ndarray]:
    """Return the boxes of pictures, and keep them in a file, from which they come the next time.

    A picture that cannot be read has none. A line a picture, so that a run that was interrupted goes on where it
    ended. What is there of other pictures or another detector is replaced.

    Args:
        names: of the pictures, below the folder.
        path: of the file.
    """
    header = json.dumps({"detector": detector.record, "pictures": Items.listed("image", names, folder).fingerprint})
    # The last line ends without its line feed where its run was killed.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    if lines[:1] != [header]:
        lines = [header]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(f"{line}\n" for line in lines).encode())
    boxes = [np.array(json.loads(line)).reshape(-1, 4) for line in lines[1:]]
    rest = tqdm(names[len(boxes) :], desc="objects", unit="picture", disable=not progress)
    with path.open("a", encoding="utf-8") as file:
        for name in rest:
            try:
                picture = load_image(folder / name)
            except ValueError:
                boxes.append(np.empty((0, 4)))
            else:
                boxes.append(detector.boxes(picture))
            file.write(f"{json.dumps(boxes[-1].tolist())}\n")
    return boxes
