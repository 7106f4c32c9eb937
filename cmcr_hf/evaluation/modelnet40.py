"""ModelNet40 for zero-shot classification of point clouds: its classes, prompts for them, and its clouds.

Published as meshes ("3D ShapeNets: A Deep Representation for Volumetric Shapes", arXiv 1406.5670), and as clouds that
the authors of PointNet (1612.00593) drew from these. Neither comes with this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.point_cloud_loading_cmcr import load_point_cloud
from ..modeling.processing_cmcr import CMCRProcessor
from .classification import class_embeds, top_k_accuracy

# In the order of the data set's labels.
CLASSES = (
    *("airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain"),
    *("desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel"),
    *("monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool"),
    *("table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox"),
)
# As many as ULIP's `modelnet40_64`, with which the published numbers are made, but in words of our own, since the
# sentences are part of another package. So an accuracy with these is not that of the published protocol to the letter.
TEMPLATES = tuple(
    sentence.format(kind, "{}")
    for kind, sentence in itertools.product(
        ("point cloud", "3D model", "3D scan", "mesh", "computer graphic", "depth image", "miniature", "drawing"),
        (
            "a {} of one {}.",
            "a {} of a whole {}.",
            "this {} shows a single {}.",
            "the {1} as a {0}.",
            "a plain {} of some {}.",
            "a detailed {} of the {}.",
            "a rough {} of a small {}.",
            "in this {} stands a large {}.",
        ),
    )
)
# Numbers of one .h5 file; the largest of the release holds 2048 clouds of 2048 points.
MAX_NUMBERS = 2**28
_ROWS = 64
_SOURCES = (
    "shape_names.txt, {0}_files.txt and the .h5 files of modelnet40_ply_hdf5_2048.zip "
    "(shapenet.cs.stanford.edu/media), or the folders CLASS/{0} with .off files of ModelNet40.zip "
    "(modelnet.cs.princeton.edu)"
)


@dataclass
class ModelNet40Split:
    """The clouds of a split, read one by one: `(key, cloud (points, 3) float32, index of its class in CLASSES)`."""

    length: int
    read: Callable[[], Iterator[tuple[str, np.ndarray, int]]]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, int]]:
        return self.read()


def class_prompts(name: str) -> list[str]:
    """Return the sentences for a class, one a template."""
    return [template.format(name.replace("_", " ")) for template in TEMPLATES]


@torch.inference_mode()
def zero_shot_metrics(
    model: CMCRModel,
    processor: CMCRProcessor,
    clouds: ModelNet40Split,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, float]:
    """Classify clouds by the mean embedding of each class's prompts: `{"top-1", "top-3", "top-5"}`, in [0, 1].

    Args:
        batch_size: clouds embedded at once.
    """
    prompts = []
    for name in tqdm(CLASSES, desc="prompts", unit="class", disable=not progress):
        inputs = processor(text=class_prompts(name)).to(model.device)
        prompts.append(model.get_text_features(**inputs).pooler_output.float())
    classes = class_embeds(torch.stack(prompts))
    scores, labels = [], []
    rows = iter(clouds)
    with tqdm(total=len(clouds), desc="point clouds", unit="cloud", disable=not progress) as bar:
        while batch := list(itertools.islice(rows, batch_size)):
            inputs = processor(point_clouds=[cloud for _, cloud, _ in batch]).to(model.device)
            embeds = model.get_point_cloud_features(**inputs).pooler_output.float()
            scores.append((embeds @ classes.T).cpu())
            labels += [label for _, _, label in batch]
            bar.update(len(batch))
    return top_k_accuracy(torch.cat(scores), labels)


def load_modelnet40(
    folder: str | Path, split: str = "test", *, max_points: int = 10_000, seed: int = 0
) -> ModelNet40Split:
    """Open a split of ModelNet40 in either of its published layouts, told apart by what is in the folder.

    Clouds are moved to their centroid and scaled to a largest norm of 1, with y up, as ULIP's are. The .h5 files come
    so; the .off files have z up and are turned, and points are drawn from their surfaces.

    Args:
        split: `test` (2468 objects) or `train` (9843, of which the .h5 files hold 9840).
        max_points: drawn from a mesh, or from a cloud with more.
        seed: of what is drawn.

    Raises:
        ValueError: the folder holds neither layout, lacks a class, or a file is damaged; names it. Damages of a cloud
            show when it is read.
        ImportError: the .h5 layout needs h5py.
    """
    folder = Path(folder)
    if split not in ("train", "test"):
        raise ValueError(f"Expected the split 'train' or 'test' of ModelNet40, got {split!r}.")
    options = {"max_points": max_points, "seed": seed}
    if (folder / "shape_names.txt").is_file():
        return _open_h5(folder, split, options)
    files = {name: sorted((folder / name / split).glob("*.off")) for name in CLASSES}
    missing = [name for name, found in files.items() if not found]
    if missing:
        raise ValueError(
            f"Expected ModelNet40 in the folder {str(folder)!r}, which has no .off file of {len(missing)} classes, "
            f"such as {missing[0]!r}. It has to hold {_SOURCES.format(split)}: download and unpack one of the two."
        )

    def read() -> Iterator[tuple[str, np.ndarray, int]]:
        for label, name in enumerate(CLASSES):
            for path in files[name]:
                x, y, z = load_point_cloud(path, normalize=True, **options).T
                yield path.relative_to(folder).as_posix(), np.stack([x, z, -y], axis=1), label

    return ModelNet40Split(sum(map(len, files.values())), read)


def _open_h5(folder: Path, split: str, options: dict[str, int]) -> ModelNet40Split:
    names = _lines(folder / "shape_names.txt", split)
    if names != list(CLASSES):
        raise ValueError(
            f"Expected the {len(CLASSES)} classes of ModelNet40 in {folder / 'shape_names.txt'}, {CLASSES[0]} to "
            f"{CLASSES[-1]}, got {names!s:.80}. Unpack modelnet40_ply_hdf5_2048.zip anew."
        )
    # The release names the files by the folder in which they were made.
    paths = [folder / Path(line).name for line in _lines(folder / f"{split}_files.txt", split)]
    if not paths:
        raise ValueError(
            f"Expected the names of .h5 files in {folder / f'{split}_files.txt'}, got none. Unpack it anew."
        )
    labels = [_h5_labels(path) for path in paths]

    def read() -> Iterator[tuple[str, np.ndarray, int]]:
        for path, classes in zip(paths, labels, strict=True):
            for start in range(0, len(classes), _ROWS):
                for row, cloud in enumerate(_h5_clouds(path, start), start):
                    try:
                        cloud = load_point_cloud(cloud, normalize=True, **options)
                    except ValueError as error:
                        raise ValueError(f"Row {row} of {path}: {error}") from error
                    yield f"{path.stem}/{row:04}", cloud, int(classes[row])

    return ModelNet40Split(sum(map(len, labels)), read)


def _lines(path: Path, split: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path}: {error}. The folder has to hold {_SOURCES.format(split)}.") from error


def _h5_labels(path: Path) -> np.ndarray:
    """Check the two arrays of a file, and return the classes of its clouds."""

    def labels(file: Any) -> np.ndarray:
        data, label = file["data"], file["label"]
        if data.ndim != 3 or data.shape[2] != 3 or data.size > MAX_NUMBERS or label.size != len(data):
            raise ValueError(f"data of shape {data.shape} and label of shape {label.shape}")
        values = label[()].reshape(-1)
        if values.dtype.kind not in "iu" or not np.isin(values, range(len(CLASSES))).all():
            raise ValueError(f"labels other than 0 to {len(CLASSES) - 1}")
        return values

    return _read_h5(path, labels)


def _h5_clouds(path: Path, start: int) -> np.ndarray:
    return _read_h5(path, lambda file: file["data"][start : start + _ROWS])


def _read_h5(path: Path, read: Callable[[Any], np.ndarray]) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise ImportError('The .h5 files of ModelNet40 need h5py: pip install "cmcr-hf[3d]"') from error
    try:
        with h5py.File(path, "r") as file:
            return read(file)
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected data (clouds, points, 3) and label (clouds, 1) in {path}, got {error!s:.200}. Unpack "
            "modelnet40_ply_hdf5_2048.zip anew."
        ) from error
