"""What is changed, one thing at a time, and what the papers say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from cmcr_hf.modeling.configuration_cmcr import LEAF_MODALITIES
from cmcr_hf.modeling.modeling_cmcr import CMCRConnector

FULL = "C-MCR, as in the paper"
NULL = "null: C-MCR on deranged texts"
# Groups of the table that conclusions are drawn from; of each part, the paper says that it helps.
PARTS = "parts of the method"
OBJECTIVES = "objectives"
BRIDGE = "bridge distillation"
# A softmax so flat that its gradient vanishes: it takes a term out of the loss and leaves everything else as it is.
FLAT = 1e6


@dataclass(frozen=True)
class Variant:
    """One way to train a connector.

    Args:
        name: the row of the table, unique.
        group: rows of a group are shown together.
        connector: fields of `CMCRConfig` that differ from those of the paper.
        temperature: tau 1, of semantic consistency; 0 takes the nearest item of the memory alone.
        pools: modalities that data is centred on, empty for the overlap alone.
        texts: kind of texts that are used, all of them where it is empty.
        share: of the texts, a fixed draw.
        batch, steps: factors of the schedule.
        edit: changes a fresh connector, its layers or what they see.
        deranged: let each text meet one about something else.
        against: the variant that it is compared with.
        dear: also measured on large text sets, where a training takes minutes.
    """

    name: str
    group: str
    connector: dict[str, Any] = field(default_factory=dict, hash=False)
    temperature: float = 0.01
    pools: tuple[str, ...] = ()
    texts: str = ""
    share: float = 1.0
    batch: float = 1.0
    steps: float = 1.0
    edit: str = ""
    deranged: bool = False
    against: str = FULL
    dear: bool = False

    @property
    def distils(self) -> bool:
        """Whether it trains on unpaired items of the memories, for which the texts are a bank."""
        return self.connector.get("objective") == "bridge-distillation"


def _drop_last_norm(connector: CMCRConnector) -> None:
    for projector in _projectors(connector):
        projector.layers = projector.layers[:-1]


def _add_layer(connector: CMCRConnector) -> None:
    for projector in _projectors(connector):
        hidden = projector.layers[0].out_features
        projector.layers = nn.Sequential(
            *projector.layers[:3], nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), *projector.layers[3:]
        )


def _make_linear(connector: CMCRConnector, norm: bool) -> None:
    for projector in _projectors(connector):
        width, dim = projector.layers[0].in_features, projector.layers[-1].num_features
        projector.layers = nn.Sequential(nn.Linear(width, dim), *([nn.BatchNorm1d(dim)] if norm else []))


def _projectors(connector: CMCRConnector) -> list[Any]:
    return list(connector.projectors.values())


def _drop_pseudo(connector: CMCRConnector) -> None:
    """Let the projectors see the overlap items in place of pseudo ones, whose norms would learn of the memories."""

    def alone(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = dict(options["embeds"])
        for space_a, space_b, overlap in connector.config.bridges or []:
            for space in (space_a, space_b):
                embeds[f"{space}_{LEAF_MODALITIES[space, overlap]}"] = embeds[f"{space}_{overlap}"]
        return inputs, {**options, "embeds": embeds}

    connector.register_forward_pre_hook(alone, with_kwargs=True)


EDITS: dict[str, Callable[[CMCRConnector], None]] = {
    "no pseudo items": _drop_pseudo,
    "no last norm": _drop_last_norm,
    "three layers": _add_layer,
    "linear": partial(_make_linear, norm=False),
    "linear and norm": partial(_make_linear, norm=True),
}

DISTILLATION_CHANGES: dict[str, dict[str, Any]] = {
    "no noise": {"noise_norm": 0.0},
    "the noise of C-MCR": {"noise_norm": 1.4310835},
    "items that are not mixed": {"mix_items": False},
    "targets to the power 1": {"target_power": 1},
    "targets without lift": {"target_lift": 0},
    "cosines at temperature 0.1": {"leaf_temperature": 0.1},
}
DEAR = ("items that are not mixed",)
_BOTH = ("overlap_temperature", "leaf_temperature")


def variants(kinds: tuple[str, ...], overlap: str, leaves: tuple[str, str]) -> list[Variant]:
    """List what is measured, the full method first.

    Args:
        kinds: of the texts, each of which is also used alone.
        overlap, leaves: the modality that connects, and those that it connects.
    """
    distillation = {"objective": "bridge-distillation"}
    return [
        Variant(FULL, "", dear=True),
        Variant("without the noise of semantic completion", PARTS, {"noise_norm": 0.0}, dear=True),
        Variant("nearest item, not the soft mean of the memory", PARTS, temperature=0.0, dear=True),
        Variant(
            f"without pseudo pairs ({overlap} pairs alone)",
            PARTS,
            {"leaf_temperature": FLAT, "intra_weight": 0.0},
            edit="no pseudo items",
            dear=True,
        ),
        Variant("without the loss of pseudo pairs", PARTS, {"leaf_temperature": FLAT}, dear=True),
        Variant(f"without the loss of {overlap} pairs", PARTS, {"overlap_temperature": FLAT}, dear=True),
        Variant("without the loss within a space", PARTS, {"intra_weight": 0.0}, dear=True),
        *(
            Variant(f"noise of norm {norm:g}", "noise (paper: 1.43)", {"noise_norm": norm})
            for norm in (0.35, 0.7, 1.0, 2.0, 3.0)
        ),
        *(
            Variant(f"tau 1 = {tau:g}", "temperature of consistency (paper: 0.01)", temperature=tau)
            for tau in (0.003, 0.03, 0.1)
        ),
        *(
            Variant(
                f"tau 2 = tau 3 = {tau:g}",
                "temperature of the losses (here 0.01)",
                dict.fromkeys(_BOTH, tau),
                dear=tau in (0.1, 0.2),
            )
            for tau in (0.03, 0.05, 0.1, 0.2, 0.5)
        ),
        Variant("lambda = 0.01", "weight of the loss within a space (paper: 0.1)", {"intra_weight": 0.01}),
        Variant("lambda = 1", "weight of the loss within a space (paper: 0.1)", {"intra_weight": 1.0}),
        Variant("squared distance", "weight of the loss within a space (paper: 0.1)", {"intra_squared": True}),
        Variant("linear", "projector (paper: Linear, norm, ReLU, Linear, norm)", edit="linear", dear=True),
        Variant("linear, then norm", "projector (paper: Linear, norm, ReLU, Linear, norm)", edit="linear and norm"),
        Variant("a third layer", "projector (paper: Linear, norm, ReLU, Linear, norm)", edit="three layers"),
        Variant("without the last norm", "projector (paper: Linear, norm, ReLU, Linear, norm)", edit="no last norm"),
        Variant(
            "a quarter of the width",
            "projector (paper: Linear, norm, ReLU, Linear, norm)",
            {"projection_dim": 128},
        ),
        Variant("half the batch, as many steps", "schedule", batch=0.5),
        Variant("twice the batch, as many steps", "schedule", batch=2.0),
        Variant("a tenth of the steps", "schedule", steps=0.1),
        *(Variant(f"{kind} alone", "texts", texts=kind, dear=True) for kind in kinds),
        *(Variant(f"{share:.0%} of the texts", "texts", share=share, dear=True) for share in (0.1, 0.3)),
        *(Variant(f"centred on {leaf} alone", "pools (paper: C-MCR text alone)", pools=(leaf,)) for leaf in leaves),
        Variant(
            "centred on all three modalities",
            "pools (paper: C-MCR text alone)",
            pools=(overlap, *leaves),
            dear=True,
        ),
        Variant("Ex-MCR, as in its paper", OBJECTIVES, {"objective": "ex-mcr"}, pools=(overlap, *leaves), dear=True),
        Variant(f"Ex-MCR, centred on {overlap} alone", OBJECTIVES, {"objective": "ex-mcr"}),
        Variant(BRIDGE, OBJECTIVES, distillation, dear=True),
        *(
            Variant(name, f"{BRIDGE}, against itself", {**distillation, **fields}, against=BRIDGE, dear=name in DEAR)
            for name, fields in DISTILLATION_CHANGES.items()
        ),
        Variant(NULL, "", deranged=True, dear=True),
    ]
