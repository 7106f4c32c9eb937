"""What bridge distillation trains on: real, unpaired items of two memories, and how well they match through a bank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..modeling.configuration_cmcr import LEAF_MODALITIES, CMCRConfig
from .posterior_files import stored_posteriors
from .posteriors import Posteriors, choose_temperatures, matches

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


def check_unpaired(config: CMCRConfig, embeds: dict[str, Tensor]) -> int:
    """Check the embeddings that [`unpaired_data`] takes; return the rows of its data set.

    Raises:
        ValueError: an embedding is missing, or the overlap has other rows in one space than in the other, or one row
            again and again.
    """
    names, leaves = _names(config)
    missing = [name for name in (*names, *leaves) if name not in embeds]
    if missing:
        raise ValueError(f"bridge-distillation needs the embeddings {missing}, got {list(embeds)}.")
    banks, overlap = [embeds[name] for name in names], names[0].split("_", 1)[1]
    if len(banks[0]) != len(banks[1]) or len(banks[0]) < 4:
        raise ValueError(
            f"Expected the same {overlap} items in both spaces, at least 4 of them, got {len(banks[0])} and "
            f"{len(banks[1])}. Embed one list in both."
        )
    for name, bank in zip(names, banks, strict=True):
        if (bank.amax(dim=0) - bank.amin(dim=0)).max() < SAME:
            raise ValueError(
                f"All {len(bank)} rows of {name} are the same, expected a bank of {overlap} items that differ: they "
                "are to tell which items match. Embed others."
            )
    return max(len(embeds[name]) for name in leaves)


def unpaired_data(
    config: CMCRConfig,
    embeds: dict[str, Tensor],
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    progress: bool = True,
) -> UnpairedDataset:
    """Compute the posteriors of both memories, at temperatures that are chosen where the configuration has none.

    Args:
        config: takes the temperatures that are chosen.
        embeds: `{"{space}_{modality}": (rows, dim)}`: the overlap modality in both spaces, row by row, and both
            memories, unpaired, as [`check_unpaired`] wants them.
        folder: keeps the posteriors, which a run that goes on finds there (see [`stored_posteriors`]).
        device: to compute on; the result is on the CPU.
        progress: show a bar.
    """
    names, leaves = _names(config)
    spaces = (config.bridges or [])[0][:2]
    banks = [embeds[name].to(device) for name in names]
    memories = [embeds[name].to(device) for name in leaves]
    if config.posterior_temperatures is None:
        chosen = choose_temperatures(banks[0], memories[0], banks[1], memories[1])
        config.posterior_temperatures = dict(zip(spaces, chosen, strict=True))
    told = [
        stored_posteriors(
            folder / name,
            memory,
            bank,
            temperature=config.posterior_temperatures[space],
            top=config.posterior_top,
            progress=progress,
        )
        for space, name, memory, bank in zip(spaces, leaves, memories, banks, strict=True)
    ]
    return UnpairedDataset({name: embeds[name] for name in leaves}, told)


def _names(config: CMCRConfig) -> tuple[list[str], list[str]]:
    """Return the names of the embeddings of the bank and of the memories, of either space."""
    space_a, space_b, overlap = (config.bridges or [])[0]
    spaces = (space_a, space_b)
    return [f"{space}_{overlap}" for space in spaces], [
        f"{space}_{LEAF_MODALITIES[space, overlap]}" for space in spaces
    ]
