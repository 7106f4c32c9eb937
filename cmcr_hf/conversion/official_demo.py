"""`cmcr verify-official`: the demo of the official repositories, with a converted model, beside its published output.

Inputs and expected values: the READMEs of MCR-PEFT/C-MCR and MCR-PEFT/Ex-MCR. Three things, each as a text, a picture,
a sound and a point cloud, and `softmax(10 * cosine)` between the modalities.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmcr_hf.conversion.convert_openshape import read_record
from cmcr_hf.modeling.configuration_cmcr import CMCRConfig
from cmcr_hf.modeling.modeling_cmcr import CMCRModel

THINGS = ("toilet", "BBQ", "train")
TEXTS = ["a toilet", "BBQ", "a train"]
FILES = {"image": "{}.jpeg", "audio": "{}.wav", "point_cloud": "{}.npy"}
BOUND = 1e-3
# The official code samples points from a random start, so that its point clouds are one of many.
STARTS = 16

Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
# By spaces and objective of a model: the matrices that the READMEs print, of the rows' and the columns' modality.
EXPECTED: dict[tuple[str, str], dict[tuple[str, str], Matrix]] = {
    ("clip clap", "c-mcr"): {
        ("image", "text"): ((0.9681, 0.0219, 0.0100), (0.0403, 0.9398, 0.0199), (0.0045, 0.0044, 0.9910)),
        ("audio", "text"): ((0.9937, 0.0028, 0.0035), (0.0337, 0.9434, 0.0229), (0.0813, 0.0253, 0.8934)),
        ("audio", "image"): ((0.9712, 0.0079, 0.0208), (0.0628, 0.8966, 0.0406), (0.0322, 0.0062, 0.9616)),
    },
    ("clip ulip", "c-mcr"): {
        ("image", "text"): ((0.7340, 0.1593, 0.1067), (0.2001, 0.5995, 0.2005), (0.1622, 0.1835, 0.6542)),
        ("point_cloud", "image"): ((0.6783, 0.1781, 0.1436), (0.1193, 0.7866, 0.0941), (0.1319, 0.2170, 0.6512)),
        ("point_cloud", "text"): ((0.7448, 0.1236, 0.1316), (0.2459, 0.5625, 0.1916), (0.2007, 0.2648, 0.5346)),
    },
    ("clip clap ulip", "ex-mcr"): {
        ("image", "text"): ((0.5737, 0.2242, 0.2021), (0.2454, 0.4756, 0.2790), (0.2541, 0.2530, 0.4929)),
        ("audio", "text"): ((0.9115, 0.0369, 0.0516), (0.1443, 0.7265, 0.1292), (0.1000, 0.0960, 0.8040)),
        ("point_cloud", "image"): ((0.8635, 0.0850, 0.0515), (0.0761, 0.9125, 0.0114), (0.1239, 0.0781, 0.7980)),
        ("audio", "image"): ((0.9060, 0.0329, 0.0611), (0.0743, 0.8742, 0.0515), (0.0648, 0.0227, 0.9126)),
        ("point_cloud", "text"): ((0.8052, 0.0909, 0.1039), (0.2447, 0.6035, 0.1518), (0.1757, 0.2094, 0.6149)),
        ("audio", "point_cloud"): ((0.9860, 0.0038, 0.0102), (0.0078, 0.9875, 0.0048), (0.0204, 0.0021, 0.9775)),
    },
}


@dataclass(frozen=True)
class Comparison:
    """A matrix of the demo beside the published one.

    Args:
        rows, columns: modalities.
        found, expected: `(3, 3)`, rows sum to 1.
        off: `(3, 3)`, by how much an entry is off: of matrices with point clouds, from the nearest one that any start
            of the sampling gives.
    """

    rows: str
    columns: str
    found: torch.Tensor
    expected: torch.Tensor
    off: torch.Tensor


def demo_expected(config: CMCRConfig) -> dict[tuple[str, str], Matrix]:
    """Return what the official demo prints for a model of these spaces and this objective.

    Raises:
        ValueError: no official demo has them.
    """
    key = (" ".join(config.spaces), config.objective)
    if key not in EXPECTED:
        known = " or ".join(f"{spaces} ({objective})" for spaces, objective in EXPECTED)
        raise ValueError(
            f"The official demos connect {known}, got a model of {key[0]} ({key[1]}). Pass one that `cmcr convert` "
            "made of the official heads, with --ulip and --clap as there."
        )
    return EXPECTED[key]


@torch.no_grad()
def verify(model: CMCRModel, processor: Any, inputs: Path) -> list[Comparison]:
    """Run the official demo with a model and compare its matrices with the published ones.

    Args:
        processor: the [`CMCRProcessor`] of the model.
        inputs: folder of the official `assets`: toilet, BBQ and train, each as .jpeg, .wav and .npy.

    Raises:
        ValueError: the model is of no official demo, or a file of the inputs is missing or damaged.
    """
    expected = demo_expected(model.config)
    modalities = {modality for pair in expected for modality in pair}
    embeds: dict[str, list[torch.Tensor]] = {}
    for modality in modalities - {"text"}:
        paths = [inputs / FILES[modality].format(thing) for thing in THINGS]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} is missing. Name the folder `assets` of MCR-PEFT/C-MCR as --inputs.")
        if modality == "image":
            outputs = [model.get_image_features(**processor(images=paths))]
        elif modality == "audio":
            outputs = [model.get_audio_features(**processor(audio=paths))]
        else:
            # Taken as they are stored: half precision, neither centred nor scaled.
            clouds = processor(point_clouds=[read_record(path)["xyz"].astype(np.float32) for path in paths])
            outputs = [model.get_point_cloud_features(**clouds, seed=seed) for seed in (None, *range(STARTS - 1))]
        embeds[modality] = [output.pooler_output for output in outputs]
    embeds["text"] = [model.get_text_features(**processor(text=TEXTS)).pooler_output]
    comparisons = []
    for (rows, columns), values in expected.items():
        wanted = torch.tensor(values)
        found = torch.stack([(10 * a @ b.T).softmax(dim=-1) for a in embeds[rows] for b in embeds[columns]])
        off = torch.maximum(found.amin(dim=0) - wanted, wanted - found.amax(dim=0)).clamp_min(0)
        comparisons.append(Comparison(rows, columns, found[0], wanted, off))
    return comparisons


def format_comparisons(comparisons: list[Comparison]) -> str:
    """Lay out the matrices as text: ours, the published one, and by how much entries are off."""
    blocks = []
    for comparison in comparisons:
        title = f"{comparison.rows} x {comparison.columns}".replace("_", " ")
        lines = [f"{title:26s}  {'ours':24s}  {'expected':24s}  off by"]
        for thing, *numbers in zip(THINGS, comparison.found, comparison.expected, comparison.off, strict=True):
            cells = ["  ".join(f"{value:.4f}" for value in row.tolist()) for row in numbers]
            lines.append("  ".join([f"{thing:26s}", *(f"{cell:24s}" for cell in cells)]).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
