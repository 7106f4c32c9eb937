"""ModelNet40 for zero-shot classification of point clouds: its classes, prompts for them, and its clouds.

Published as meshes ("3D ShapeNets: A Deep Representation for Volumetric Shapes", arXiv 1406.5670), and as clouds that
the authors of PointNet (1612.00593) drew from these. Neither comes with this package.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.point_cloud_loading_cmcr import load_point_cloud
from ..training.data import Item, Items, RemoteFile
from .labelled import LabelledSet

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


def load_modelnet40(
    folder: str | Path, split: str = "test", *, max_points: int = 10_000, seed: int = 0, limit: int | None = None
) -> LabelledSet:
    """Open a split of ModelNet40 in either of its published layouts, told apart by what is in the folder.

    Clouds are moved to their centroid and scaled to a largest norm of 1, with y up, as ULIP's are. The .h5 files come
    so; the .off files have z up and are turned, and points are drawn from their surfaces. A cloud is read and moved
    when its item is.

    Args:
        split: `test` (2468 objects) or `train` (9843, of which the .h5 files hold 9840).
        max_points: drawn from a mesh, or from a cloud with more.
        seed: of what is drawn.
        limit: take so many at most, from the start.

    Raises:
        ValueError: the folder holds neither layout, lacks a class, or a file is damaged; names it. Damages of a cloud
            show when it is read.
        ImportError: the .h5 layout needs h5py.
    """
    folder = Path(folder)
    if split not in ("train", "test"):
        raise ValueError(f"Expected the split 'train' or 'test' of ModelNet40, got {split!r}.")
    options = {"max_points": max_points, "seed": seed}
    open_layout = _open_h5 if (folder / "shape_names.txt").is_file() else _open_meshes
    items = open_layout(folder, split, options)[:limit]
    return LabelledSet(
        name="ModelNet40",
        items=Items.made("point_cloud", items, f"normalised, y up, {options}"),
        classes=list(CLASSES),
        words=[[name.replace("_", " ")] for name in CLASSES],
        labels=[[CLASSES.index(str(item.label))] for item in items],
        licence="for academic use, the models their authors'",
    )


def _open_meshes(folder: Path, split: str, options: dict[str, int]) -> list[Item]:
    files = {name: sorted((folder / name / split).glob("*.off")) for name in CLASSES}
    missing = [name for name, found in files.items() if not found]
    if missing:
        raise ValueError(
            f"Expected ModelNet40 in the folder {str(folder)!r}, which has no .off file of {len(missing)} classes, "
            f"such as {missing[0]!r}. It has to hold {_SOURCES.format(split)}: download and unpack one of the two."
        )

    def read(path: Path) -> bytes:
        x, y, z = load_point_cloud(path, normalize=True, **options).T
        return _npy(np.stack([x, z, -y], axis=1))

    return [
        Item(path.relative_to(folder).as_posix(), RemoteFile(str(path), partial(read, path)), name)
        for name in CLASSES
        for path in files[name]
    ]


def _open_h5(folder: Path, split: str, options: dict[str, int]) -> list[Item]:
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
    # Rows are stored in compressed blocks of many, and asked for one by one.
    block = lru_cache(maxsize=2)(_h5_clouds)

    def read(path: Path, row: int) -> bytes:
        cloud = block(path, row - row % _ROWS)[row % _ROWS]
        try:
            return _npy(load_point_cloud(cloud, normalize=True, **options))
        except ValueError as error:
            raise ValueError(f"Row {row} of {path}: {error}") from error

    return [
        Item(f"{path.stem}/{row:04}", RemoteFile(str(path), partial(read, path, row)), CLASSES[label])
        for path in paths
        for row, label in enumerate(_h5_labels(path).tolist())
    ]


def _npy(cloud: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, cloud)
    return buffer.getvalue()


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
    # The classes of its clouds are in it too: without it nobody knows what is left out.
    remedy = "Unpack modelnet40_ply_hdf5_2048.zip anew."
    if not path.is_file():
        raise ValueError(f"There is no file {path}, which the folder's lists name. {remedy}")
    try:
        with h5py.File(path, "r") as file:
            return read(file)
    except (LookupError, OSError, RuntimeError) as error:
        reason = f"{error.args[-1] if error.args else error!s:.120}"
        raise ValueError(
            f"Cannot read {path}: it is damaged, cut off or no HDF5 with data and label ({reason}). {remedy}"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected data (clouds, points, 3) and label (clouds, 1) in {path}, got {error!s:.200}. {remedy}"
        ) from error
