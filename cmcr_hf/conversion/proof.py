"""The proof of a conversion: the outputs of the converted model beside upstream's, on fixed inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PLAIN = "a plain reading of the original layout"


@dataclass(frozen=True)
class Proof:
    """How far a converted model is from upstream.

    Args:
        reference: what it was compared with, such as `open_clip_torch 3.3.0`.
        differences: largest absolute difference of the unit vectors, by output.
        bound: what none of them may exceed.
    """

    reference: str
    differences: dict[str, float]
    bound: float


def prove(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    reference: str = PLAIN,
    *,
    bound: float = 1e-5,
) -> Proof:
    """Compare embeddings `(rows, dim)` of the same inputs by name, each scaled to unit length.

    Raises:
        ValueError: an output differs by more than `bound`, or is not finite; names it.
    """
    differences = {
        name: (F.normalize(found[name].double(), dim=-1) - F.normalize(rows.double(), dim=-1)).abs().max().item()
        for name, rows in expected.items()
    }
    for name, difference in differences.items():
        # A comparison with NaN is false.
        if not difference <= bound:
            raise ValueError(
                f"The converted model does not give what {reference} gives: its {name} embeddings differ by "
                f"{difference:.2g}, expected at most {bound:g}. Nothing was written."
            )
    return Proof(reference, differences, bound)


def unit_rows(width: int, rows: int = 64) -> torch.Tensor:
    """Return the same random unit rows `(rows, width)` at every call."""
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)), dim=-1)
