"""What bridge distillation trains on: real, unpaired items of two memories, and how well they match through a bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..modeling.configuration_cmcr import LEAF_MODALITIES, CMCRConfig
from .posteriors import Posteriors, choose_temperatures, matches, posteriors

# Rounding moves the coordinates of a text that is embedded again by less.
SAME = 1e-6


class UnpairedDataset(Dataset[dict[str, Any]]):
    """Items of two memories and their posteriors, indexed a whole batch at a time.

    An epoch shows every item of the larger memory once. Those of the smaller one come round as often as that takes,
    all equally often within one: index i stands for row i of either, counted on from the start behind the last. Which
    two items share an index matters little, since a batch compares all with all.

    Args:
        items: `{"{space}_{modality}": (rows, dim)}` of both memories.
        told: the posteriors of both, in the same order.
    """

    def __init__(self, items: dict[str, Tensor], told: Sequence[Posteriors]) -> None:
        self.items = items
        self.told = list(told)

    def __len__(self) -> int:
        return max(len(rows) for rows in self.items.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all embeddings and posteriors."""
        return sum(rows.nbytes for rows in self.items.values()) + sum(part.nbytes for part in self.told)

    def to(self, device: torch.device | str) -> UnpairedDataset:
        """Return the data set with everything on a device."""
        items = {name: rows.to(device) for name, rows in self.items.items()}
        return UnpairedDataset(items, [part.to(device) for part in self.told])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        embeds, told = {}, []
        for (name, items), part in zip(self.items.items(), self.told, strict=True):
            rows = (torch.as_tensor(indices) % len(items)).to(items.device)
            embeds[name] = items[rows].float()
            told.append(part[rows])
        return {"embeds": embeds, "matches": matches(*told)}


def unpaired_data(
    config: CMCRConfig, embeds: dict[str, Tensor], device: torch.device | str = "cpu"
) -> UnpairedDataset:
    """Compute the posteriors of both memories, at temperatures that are chosen where the configuration has none.

    Args:
        config: takes the temperatures that are chosen.
        embeds: `{"{space}_{modality}": (rows, dim)}`: the overlap modality in both spaces, row by row, and both
            memories, unpaired.
        device: to compute on; the result is on the CPU.

    Raises:
        ValueError: an embedding is missing, or the overlap has other rows in one space than in the other, or one row
            again and again.
    """
    space_a, space_b, overlap = (config.bridges or [])[0]
    spaces = (space_a, space_b)
    leaves = [f"{space}_{LEAF_MODALITIES[space, overlap]}" for space in spaces]
    missing = [name for name in (f"{space_a}_{overlap}", f"{space_b}_{overlap}", *leaves) if name not in embeds]
    if missing:
        raise ValueError(f"bridge-distillation needs the embeddings {missing}, got {list(embeds)}.")
    banks = [embeds[f"{space}_{overlap}"].to(device) for space in spaces]
    if len(banks[0]) != len(banks[1]) or len(banks[0]) < 4:
        raise ValueError(
            f"Expected the same {overlap} items in both spaces, at least 4 of them, got {len(banks[0])} and "
            f"{len(banks[1])}. Embed one list in both."
        )
    for space, bank in zip(spaces, banks, strict=True):
        if (bank.amax(dim=0) - bank.amin(dim=0)).max() < SAME:
            raise ValueError(
                f"All {len(bank)} rows of {space}_{overlap} are the same, expected a bank of {overlap} items that "
                "differ: they are to tell which items match. Embed others."
            )
    memories = [embeds[name].to(device) for name in leaves]
    if config.posterior_temperatures is None:
        chosen = choose_temperatures(banks[0], memories[0], banks[1], memories[1])
        config.posterior_temperatures = dict(zip(spaces, chosen, strict=True))
    told = [
        posteriors(memory, bank, temperature=config.posterior_temperatures[space], top=config.posterior_top).to("cpu")
        for space, memory, bank in zip(spaces, memories, banks, strict=True)
    ]
    return UnpairedDataset({name: embeds[name] for name in leaves}, told)
