"""Import upstream packages, which are optional here and need torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

# What torchvision's compiled part declares and its Python part expects.
OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []


def repair_torchvision() -> None:
    """Make an installed torchvision importable that is built for another torch, as a CUDA build beside a CPU torch is.

    Its import fails for the operators of its compiled part, and with it that of transformers' CLIP and CLAP. Once the
    operators are declared, all of it can be used but them. A torchvision that is sound or missing stays as it is.
    """
    if _declared or "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if f"operator torchvision::{OPERATORS[0]} does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # The operators are there as long as the library object is.
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in OPERATORS:
            _declared[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def import_upstream(package: str, extra: str) -> ModuleType:
    """Import an upstream package.

    Args:
        extra: of this package, that installs it.

    Raises:
        ImportError: the package is not installed; names the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'The package {package} is not installed. Install it: pip install "cmcr-hf[{extra}]".')
    repair_torchvision()
    return importlib.import_module(package)
