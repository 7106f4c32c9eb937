"""Random tensors in the layouts of the official heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def clap_clip_heads(sizes: Mapping[str, int], width: int) -> dict[str, torch.Tensor]:
    """Return tensors of the layout of `clap_clip.pt`: heads from spaces of the given sizes into one of `width`."""
    torch.manual_seed(0)
    return {
        f"{head}.{key}": value
        for head, size in sizes.items()
        for net, shape in {"net1": (size, 2 * width), "net2": (2 * width, width)}.items()
        for key, value in _layers(net, *shape).items()
    }


def ulip_clip_heads(sizes: Mapping[str, int], width: int) -> dict[str, torch.Tensor]:
    """Return tensors of the layout of `ulip_clip.pt`: heads from spaces of the given sizes into one of `width`."""
    torch.manual_seed(0)
    return {
        f"{head}.{key}": value for head, size in sizes.items() for key, value in _layers("net", size, width).items()
    }


def ex_heads(size: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Return tensors of the layout of `ex_clap.pt`: from a space of `size` into one of `width`, else of the same."""
    torch.manual_seed(0)
    width = width or size
    state = {f"Head1.{key}": value for key, value in torch.nn.Linear(size, size).state_dict().items()}
    for mlp, inner in {"mlp1": size, "mlp2": width}.items():
        for net, shape in {"net1": (inner, 2 * width), "net2": (2 * width, width)}.items():
            state |= {f"Head2.{mlp}.{key}": value for key, value in _layers(net, *shape).items()}
    return state


def _layers(net: str, inner: int, outer: int) -> dict[str, torch.Tensor]:
    layers = torch.nn.Sequential(torch.nn.Linear(inner, outer), torch.nn.BatchNorm1d(outer))
    return {f"{net}.{key}": value for key, value in layers.state_dict().items()}
