"""What open_clip's names and files say of a model: its architecture, and how its images are prepared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .upstream import import_upstream

CONFIG_NAME = "open_clip_config.json"
MAX_CONFIG_BYTES = 2**20
MAX_IMAGE_SIZE = 4096
# Of pixels from 0 to 1. open_clip takes one number for all three channels.
RANGES = {"mean": (0, 1), "std": (0.001, 1)}
ACTIVATIONS = {False: "gelu", True: "quick_gelu"}


def read_config(path: str | Path) -> dict[str, Any] | None:
    """Read the `open_clip_config.json` beside a file of weights: `model_cfg` and `preprocess_cfg`; `None` if missing.

    Of the `preprocess_cfg`, what is null counts as not said.

    Raises:
        ValueError: the file is damaged, too large or of another form, or prepares images of another size than the
            model's; names it.
    """
    path = Path(path).parent / CONFIG_NAME
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}. Check the file.") from error
    try:
        if len(content) > MAX_CONFIG_BYTES:
            raise ValueError(f"it is larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(content)
        model = config["model_cfg"]
        parts = (model["vision_cfg"], model["text_cfg"], config.setdefault("preprocess_cfg", {}))
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("its parts are no objects")
        preprocess = {key: value for key, value in config["preprocess_cfg"].items() if value is not None}
        config["preprocess_cfg"] = preprocess
        _check_preprocess(preprocess, model["vision_cfg"].get("image_size", 224))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"Cannot read {path}: expected the model_cfg and preprocess_cfg of an open_clip model ({error!s:.200}). "
            "Download it again."
        ) from error
    return dict(config)


def _check_preprocess(preprocess: Mapping[str, Any], image_size: Any) -> None:
    if "size" in preprocess and _sides(preprocess["size"]) != _sides(image_size):
        raise ValueError(
            f"preprocess_cfg.size={preprocess['size']!r} is not the model's vision_cfg.image_size={image_size!r}"
        )
    for key, (low, high) in RANGES.items():
        value = preprocess.get(key, high)
        numbers = value if isinstance(value, list) else [value] * 3
        if len(numbers) != 3 or not all(type(number) in (int, float) and low <= number <= high for number in numbers):
            raise ValueError(f"preprocess_cfg.{key}={value!r:.80} is not three numbers from {low} to {high}")
    for key in ("interpolation", "resize_mode", "mode"):
        if not isinstance(preprocess.get(key, ""), str):
            raise ValueError(f"preprocess_cfg.{key}={preprocess[key]!r:.80} is no name")


def _sides(size: Any) -> list[int]:
    """Return the height and width of images of a size, which is a number or the two."""
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_IMAGE_SIZE for side in sides):
        raise ValueError(f"the size {size!r:.80} is not one or two whole numbers from 1 to {MAX_IMAGE_SIZE}")
    return sides


def named_config(name: str, tag: str) -> dict[str, Any]:
    """Return `model_cfg` and `preprocess_cfg` of a model and its weights by open_clip's names, such as
    `ViT-B-32/laion2b_s34b_b79k`.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: it knows no such model or weights, or the weights were trained with the other activation.
    """
    open_clip = import_upstream("open_clip", "open-clip")
    model, pretrained = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    if model is None or not pretrained:
        known = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"open_clip {open_clip.__version__} knows no weights {name}/{tag}. Expected "
            + (f"one of {known} for {name}." if known else "the name of one of its models with weights.")
        )
    check_activation(name, tag, model, pretrained)
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: pretrained[key] for key in keys if key in pretrained}
    return {"model_cfg": model, "preprocess_cfg": {"size": model["vision_cfg"].get("image_size", 224), **preprocess}}


def check_activation(name: str, tag: str, model: Mapping[str, Any], pretrained: Mapping[str, Any]) -> None:
    """Check that weights were trained with the activation of the model, which open_clip only warns of.

    Raises:
        ValueError: they were not; names the model to use.
    """
    if bool(model.get("quick_gelu")) != bool(pretrained.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if model.get("quick_gelu") else f"{name}-quickgelu"
        raise ValueError(
            f"The weights {tag!r} of {name} were trained with the activation "
            f"{ACTIVATIONS[bool(pretrained.get('quick_gelu'))]}, which {name} does not have. Use {other}/{tag}."
        )
