"""Convert the released heads of Ex-MCR, `ex_clap.pt` and `ex_ulip.pt`: `cmcr convert ex-mcr --help`.

Layout: `Ex_MCR_Head` of MCR-PEFT/Ex-MCR. A file holds the head of one leaf space; both have the same layout, so that
nothing but its name tells one from the other. CLIP, the base space, goes untouched.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from cmcr_hf.conversion.checkpoint import Checkpoint, convert_keys, read_checkpoint, width
from cmcr_hf.conversion.convert_cmcr import BOUND, MAX_BYTES, build_connector
from cmcr_hf.conversion.plain import Weights, batch_norm, linear
from cmcr_hf.conversion.proof import Proof, prove, unit_rows
from cmcr_hf.modeling.configuration_cmcr import SPACE_MODALITIES, CMCRConfig
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector

UPSTREAM = "the heads of Ex-MCR, ex_clap.pt and ex_ulip.pt"
KEYS: dict[str, str | None] = {
    r"Head1\.(\w+)": r"leaf_linear.\1",
    **{
        rf"Head2\.mlp{mlp}\.net{net}\.{part}\.(\w+)": rf"layers.{5 * (mlp - 1) + 3 * (net - 1) + part}.\1"
        for mlp in (1, 2)
        for net in (1, 2)
        for part in (0, 1)
    },
}


def convert_state_dicts(
    state_dicts: Mapping[str, Mapping[str, torch.Tensor]],
) -> tuple[CMCRConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the weights of the [`CMCRConnector`] that released heads stand for.

    Args:
        state_dicts: one by leaf space, `clap` and `ulip` or one of them.

    Raises:
        ValueError: a key is not of this layout, one is missing, or the heads lead into spaces of different widths.
    """
    weights: dict[str, torch.Tensor] = {}
    projectors: dict[str, dict] = {}
    for space, state_dict in state_dicts.items():
        converted = convert_keys(state_dict, KEYS, UPSTREAM)
        weights |= {f"projectors.{space}.{key}": tensor for key, tensor in converted.items()}
        projectors[space] = {
            "layout": "ex-mcr",
            "input_dim": width(state_dict, "Head1.weight", 1),
            "hidden_dim": width(state_dict, "Head2.mlp1.net1.0.weight"),
        }
    widths = {width(state_dict, "Head2.mlp2.net2.0.weight") for state_dict in state_dicts.values()}
    if len(widths) != 1:
        raise ValueError(f"Expected heads into one space, got widths {sorted(widths)}. Pass the released files.")
    (projection_dim,) = widths
    projectors = {"clip": {"layout": "identity", "input_dim": projection_dim}, **projectors}
    config = CMCRConfig(
        projectors={space: projectors[space] for space in SPACE_MODALITIES if space in projectors},
        projection_dim=projection_dim,
        objective="ex-mcr",
        overlap_temperature=0.05,
        leaf_temperature=0.05,
    )
    return config, weights


def read_connector(paths: Mapping[str, str | Path]) -> tuple[CMCRConnector, dict[str, Checkpoint]]:
    """Read released heads, weights-only, as one connector in eval mode, with CLIP as the shared space.

    Args:
        paths: one by leaf space, `clap` and `ulip` or one of them.

    Raises:
        ValueError: a file is missing, damaged, larger than 256 MiB, or not of this layout; names it.
    """
    checkpoints = {space: read_checkpoint(path, max_bytes=MAX_BYTES) for space, path in paths.items()}
    try:
        config, weights = convert_state_dicts({space: found.weights for space, found in checkpoints.items()})
        return build_connector(config, weights, UPSTREAM), checkpoints
    except ValueError as error:
        raise ValueError(f"Cannot convert {', '.join(map(str, paths.values()))}: {error}") from error


def plain_head(rows: torch.Tensor, weights: Weights, *, leaf: bool) -> torch.Tensor:
    """Project unit rows `(rows, input_dim)` with a released head, not normalised; `leaf` rows go through Head1 too."""
    rows = linear(rows, weights, "Head1") if leaf else rows
    for mlp in ("Head2.mlp1", "Head2.mlp2"):
        hidden = batch_norm(linear(rows, weights, f"{mlp}.net1.0"), weights, f"{mlp}.net1.1").relu()
        rows = batch_norm(linear(hidden, weights, f"{mlp}.net2.0"), weights, f"{mlp}.net2.1")
    return rows


@torch.no_grad()
def prove_connector(connector: CMCRConnector, checkpoints: Mapping[str, Checkpoint]) -> Proof:
    """Compare a converted connector with a plain reading of the files, on random unit rows of every modality.

    Raises:
        ValueError: they differ by more than the bound.
    """
    rows = unit_rows(connector.config.projection_dim)  # type: ignore[arg-type]
    found, expected = {"clip": connector.project(rows, "clip")}, {"clip": rows}
    for space, checkpoint in checkpoints.items():
        plain = {key: tensor.float() for key, tensor in checkpoint.weights.items()}
        rows = unit_rows((connector.config.projectors or {})[space]["input_dim"])
        for modality in SPACE_MODALITIES[space]:
            name = f"{space} {modality}"
            found[name] = connector.project(rows, space, modality)
            expected[name] = plain_head(rows, plain, leaf=modality == SPACE_MODALITIES[space][0])
    return prove(found, expected, bound=BOUND)


if __name__ == "__main__":
    from cmcr_hf.cli import main

    sys.exit(main(["convert", "ex-mcr", *sys.argv[1:]]))
