"""Convert the released heads of C-MCR, `clap_clip.pt` and `ulip_clip.pt`: `cmcr convert cmcr --help`.

Layout: `CLAPCLIP_Head` and `ULIPCLIP_Head` of MCR-PEFT/C-MCR (CC BY 4.0). The two files name their heads the other way
round: CLIP is Head_B beside CLAP and Head_A beside ULIP.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from cmcr_hf.conversion.checkpoint import Checkpoint, convert_keys, load_weights, read_checkpoint, width
from cmcr_hf.conversion.plain import Weights, batch_norm, linear
from cmcr_hf.conversion.proof import Proof, prove, unit_rows
from cmcr_hf.modeling.configuration_cmcr import CMCRConfig
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector

# A key that tells a file from the other, its spaces, the layout of its projectors, and where their layers are.
FILES = {
    "Head_A.net1.0.weight": (
        {"Head_A": "clap", "Head_B": "clip"},
        "linear-bn-relu-linear-bn",
        {"net1.0": 0, "net1.1": 1, "net2.0": 3, "net2.1": 4},
    ),
    "Head_A.net.0.weight": ({"Head_A": "clip", "Head_B": "ulip"}, "linear-bn-relu", {"net.0": 0, "net.1": 1}),
}
UPSTREAM = "the heads of C-MCR, clap_clip.pt or ulip_clip.pt"
MAX_BYTES = 2**28  # The larger of the two has 8.4 MB.
# Of unit vectors in float32: two orders of the same sums differ by a third of it.
BOUND = 1e-6


def _known(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], str, dict[str, int]]:
    for key, known in FILES.items():
        if key in state_dict:
            return known
    raise ValueError(f"Expected {UPSTREAM}, with one of the keys {list(FILES)}, got {[*state_dict][:4]}.")


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> tuple[CMCRConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the weights of the [`CMCRConnector`] that a released file of heads stands for.

    Raises:
        ValueError: a key is none of these layouts, or one is missing; names it.
    """
    heads, layout, layers = _known(state_dict)
    keys: dict[str, str | None] = {
        re.escape(f"{head}.{old}.") + r"(\w+)": rf"projectors.{space}.layers.{new}.\1"
        for head, space in heads.items()
        for old, new in layers.items()
    }
    weights = convert_keys(state_dict, keys, UPSTREAM)
    # In the order of our configurations, so that CLIP comes first in both.
    order = sorted(heads, key=lambda head: ("clip", "clap", "ulip").index(heads[head]))
    linears = [old for old, new in layers.items() if new % 3 == 0]
    first, last = linears[0], linears[-1]
    projectors = {
        heads[head]: {"layout": layout, "input_dim": width(state_dict, f"{head}.{first}.weight", 1)} for head in order
    }
    if len(linears) > 1:
        for head in order:
            projectors[heads[head]]["hidden_dim"] = width(state_dict, f"{head}.{first}.weight")
    projection_dim = width(state_dict, f"{order[0]}.{last}.weight")
    return CMCRConfig(projectors=projectors, projection_dim=projection_dim), weights


def read_connector(path: str | Path) -> tuple[CMCRConnector, Checkpoint]:
    """Read a released file of heads, weights-only, as a connector in eval mode.

    Raises:
        ValueError: the file is missing, damaged, larger than 256 MiB, holds anything but tensors, or other tensors
            than those of the two layouts; names it.
    """
    checkpoint = read_checkpoint(path, max_bytes=MAX_BYTES)
    try:
        config, weights = convert_state_dict(checkpoint.weights)
        return build_connector(config, weights, UPSTREAM), checkpoint
    except ValueError as error:
        raise ValueError(f"Cannot convert {path}: {error}") from error


def build_connector(config: CMCRConfig, weights: dict[str, torch.Tensor], upstream: str) -> CMCRConnector:
    """Return a connector with converted weights, in eval mode; upstream's heads have no logit scale of their own."""
    connector = CMCRConnector(config)
    load_weights(connector, {**weights, "logit_scale": connector.logit_scale.detach()}, upstream)
    return connector.eval()


def plain_head(rows: torch.Tensor, weights: Weights, head: str) -> torch.Tensor:
    """Project unit rows `(rows, input_dim)` with a head of a released file, not normalised."""
    if f"{head}.net.0.weight" in weights:
        return batch_norm(linear(rows, weights, f"{head}.net.0"), weights, f"{head}.net.1").relu()
    hidden = batch_norm(linear(rows, weights, f"{head}.net1.0"), weights, f"{head}.net1.1").relu()
    return batch_norm(linear(hidden, weights, f"{head}.net2.0"), weights, f"{head}.net2.1")


@torch.no_grad()
def prove_connector(connector: CMCRConnector, checkpoint: Checkpoint) -> Proof:
    """Compare a converted connector with a plain reading of the file, on random unit rows for every head.

    Raises:
        ValueError: they differ by more than the bound.
    """
    heads, _, _ = _known(checkpoint.weights)
    plain = {key: tensor.float() for key, tensor in checkpoint.weights.items()}
    found, expected = {}, {}
    for head, space in heads.items():
        rows = unit_rows((connector.config.projectors or {})[space]["input_dim"])
        found[space] = connector.project(rows, space)
        expected[space] = plain_head(rows, plain, head)
    return prove(found, expected, bound=BOUND)


if __name__ == "__main__":
    from cmcr_hf.cli import main

    sys.exit(main(["convert", "cmcr", *sys.argv[1:]]))
