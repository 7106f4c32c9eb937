"""Read the released heads of C-MCR, `clap_clip.pt` and `ulip_clip.pt`, as a `CMCRConnector`.

Layout: `CLAPCLIP_Head` and `ULIPCLIP_Head` of MCR-PEFT/C-MCR (CC BY 4.0). The two files name their heads the other way
round: CLIP is Head_B beside CLAP and Head_A beside ULIP.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..modeling.configuration_cmcr import CMCRConfig
from ..modeling.modeling_cmcr import CMCRConnector

# A key that tells a file from the other, its spaces, the layout of its projectors, and where their layers are.
FILES = {
    "Head_A.net1.0.weight": (
        {"Head_A": "clap", "Head_B": "clip"},
        "linear-bn-relu-linear-bn",
        {"net1.0": 0, "net1.1": 1, "net2.0": 3, "net2.1": 4},
    ),
    "Head_A.net.0.weight": ({"Head_A": "clip", "Head_B": "ulip"}, "linear-bn-relu", {"net.0": 0, "net.1": 1}),
}
MAX_BYTES = 2**28  # The larger of the two has 8.4 MB.


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> tuple[CMCRConfig, dict[str, torch.Tensor]]:
    """Return the configuration and the weights of the [`CMCRConnector`] that a released file of heads stands for.

    Raises:
        ValueError: a key is none of these layouts, or one is missing; names it.
    """
    known = next((parts for key, parts in FILES.items() if key in state_dict), None)
    if known is None:
        raise ValueError(
            f"Expected the heads of C-MCR, with one of the keys {list(FILES)}, got {[*state_dict][:4]}. Pass "
            "clap_clip.pt or ulip_clip.pt."
        )
    heads, layout, layers = known
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(Head_[AB])\.(net\d?\.\d)\.(\w+)", key)
        if match is None or match[2] not in layers:
            raise ValueError(f"Unknown key {key!r} in heads of the layout {layout}. Pass the released file as it is.")
        converted[f"projectors.{heads[match[1]]}.layers.{layers[match[2]]}.{match[3]}"] = tensor
    # In the order of our configurations, so that CLIP comes first in both.
    projectors = {
        space: {"layout": layout, "input_dim": _width(converted, f"projectors.{space}.layers.0.weight", 1)}
        for space in sorted(heads.values(), key=("clip", "clap", "ulip").index)
    }
    last = f"projectors.clip.layers.{max(layers.values()) - 1}.weight"
    config = CMCRConfig(projectors=projectors, projection_dim=_width(converted, last, 0))
    if layout == "linear-bn-relu-linear-bn":
        for space, projector in (config.projectors or {}).items():
            projector["hidden_dim"] = _width(converted, f"projectors.{space}.layers.0.weight", 0)
    return config, converted


def _width(weights: Mapping[str, torch.Tensor], key: str, axis: int) -> int:
    if key not in weights:
        raise ValueError(f"The heads lack the weights that become {key!r}. Pass the released file as it is.")
    return int(weights[key].shape[axis])


def read_connector(path: str | Path) -> CMCRConnector:
    """Read a released file of heads, weights-only, as a connector in eval mode.

    Raises:
        ValueError: the file is missing, damaged, larger than 256 MiB, holds anything but tensors, or other tensors
            than those of the two layouts; names it.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state_dict, Mapping) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
            raise ValueError("it holds something else than named tensors")
        config, weights = convert_state_dict(state_dict)
        connector = CMCRConnector(config)
        weights["logit_scale"] = connector.logit_scale.detach()
        connector.load_state_dict(weights)
    # What torch raises on damaged files, depending on the place.
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"Cannot read {path} as heads of C-MCR: {reason:.500}") from error
    return connector.eval()
