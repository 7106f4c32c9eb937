"""What `cmcr evaluate` is to give, by hand: the features of the model's own methods, numpy and scikit-learn."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from sklearn.metrics import average_precision_score

from cmcr_hf import CMCRModel, CMCRProcessor
from cmcr_hf.cli import main
from tests.media import RATE, chord, encode_audio, encode_image, patchwork

RESAMPLES = 20
_ARGUMENTS = {"image": "images", "audio": "audio", "text": "text", "point_cloud": "point_clouds"}


def evaluate(task: str, model: Path, data: Path | None, layout: str, output: Path, *more: str) -> dict[str, Any]:
    words = ["evaluate", task, "--model", str(model), "--output", str(output)]
    words += [] if data is None else ["--data", str(data), "--layout", layout]
    assert main([*words, "--bootstrap", str(RESAMPLES), "--device", "cpu", *more]) == 0
    document: dict[str, Any] = json.loads((output / "result.json").read_text())
    return document


@functools.cache
def loaded(folder: Path) -> tuple[CMCRModel, CMCRProcessor]:
    return CMCRModel.from_pretrained(folder), CMCRProcessor.from_pretrained(folder)


@torch.inference_mode()
def embed(folder: Path, modality: str, values: Sequence[Any], space: str | None = None) -> np.ndarray:
    """Embed items, all in one batch, in the shared space of the model of a folder."""
    model, processor = loaded(folder)
    inputs = processor(**{_ARGUMENTS[modality]: list(values)}, space=space)
    rows = getattr(model, f"get_{modality}_features")(**inputs, space=space).pooler_output
    return rows.double().numpy()


@torch.inference_mode()
def embed_source(folder: Path, modality: str, values: Sequence[Any], space: str) -> np.ndarray:
    """Embed items in the space of a source, scaled to unit length."""
    model, processor = loaded(folder)
    inputs = processor(**{_ARGUMENTS[modality]: list(values)}, space=space)
    rows = getattr(model.sources[space], f"get_{modality}_features")(**inputs).pooler_output.double().numpy()
    return unit(rows)


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


def rankings(scores: np.ndarray, right: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """Return what every query gives: whether one that is right is among the first k, the average precision, and so on.

    Args:
        scores: `(queries, gallery)`.
        right: the same shape, bool.
    """
    order = (-scores).argsort(axis=1)
    ranked, ordered = np.take_along_axis(right, order, axis=1), np.take_along_axis(scores, order, axis=1)
    # Rounding must not decide between what is right and what is not.
    assert -np.diff(ordered, axis=1)[ranked[:, 1:] != ranked[:, :-1]].max() > 1e-6
    rank = ranked.argmax(axis=1) + 1
    precision = [average_precision_score(own, row) for own, row in zip(right, scores, strict=True)]
    recalls = {f"R@{k}": rank <= k for k in ks if k <= scores.shape[1]}
    precisions = {f"P@{k}": ranked[:, :k].mean(axis=1) for k in ks if k <= min(scores.shape)}
    return {**recalls, **precisions, "mAP": np.array(precision), "median rank": rank}


def statistic_of(metric: str) -> Callable[[np.ndarray], Any]:
    return np.median if metric == "median rank" else np.mean


def resampled(values: np.ndarray, statistic: Callable[[np.ndarray], Any], groups: np.ndarray) -> list[float]:
    """Return the ends of 95 % of what draws of whole groups give, the draws those of the command with the seed 0.

    Draws that give NaN count as none.

    Args:
        values: `(rows,)`.
        groups: `(rows,)` numbers from 0 on.
    """
    count = groups.max() + 1
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [np.flatnonzero(groups == group) for group in range(count)]
    found = [statistic(values[np.concatenate([rows[group] for group in draw])]) for draw in draws]
    return np.nanquantile(found, [0.025, 0.975]).tolist()


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_clips(folder: Path, names: Sequence[str]) -> list[Path]:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_audio(chord(RATE // 4, seed=seed)))
    return [folder / name for name in names]


def write_photos(folder: Path, names: Sequence[str]) -> list[Path]:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_image(patchwork(seed=seed), "JPEG"))
    return [folder / name for name in names]


def write_data_set(folder: Path, columns: dict[str, list[Any]], features: datasets.Features) -> None:
    folder.mkdir(parents=True)
    # From arrow, since `datasets` encodes audio with torchcodec alone.
    table = datasets.table.InMemoryTable(pa.table(columns, schema=features.arrow_schema))
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features)).to_parquet(folder / "test-0.parquet")
