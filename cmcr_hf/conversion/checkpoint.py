"""Read upstream checkpoints as named tensors: weights alone, of bounded size, nothing in them run."""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..durable import sha256

# All that a pickle of tensors names. torch's own list is longer and holds what makes tensors of any size.
TENSOR_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
    ),
}
# What torch and the zip reader raise on damaged files, depending on the place.
DAMAGES = (
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of an upstream file, by upstream's own names without `module.`, and what identifies the file."""

    path: Path
    sha256: str
    weights: dict[str, torch.Tensor]


def read_checkpoint(
    path: str | Path, *, max_bytes: int, allowed: Mapping[str, Any] | None = None, strip: str = "module."
) -> Checkpoint:
    """Read the tensors of a `.pt` file, or of the `state_dict` in one, or of a `.safetensors` file.

    Tensors of a `.pt` file are mapped from the disk: what is not used, such as an optimizer's state, is not read.

    Args:
        max_bytes: that the file, and all tensors in it together, may have.
        allowed: what a pickle may name beside tensors: `{"argparse Namespace": argparse.Namespace}`.
        strip: start of every key that is left out where all keys have it.

    Raises:
        ValueError: the file is missing, damaged, too large, compressed or of another kind; its pickle names what is
            not allowed; a key holds no tensor, or one with values that are not finite. Names the file and the reason.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file. Check the path")
        if path.stat().st_size > max_bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {max_bytes}")
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            _check_archive(path, allowed or {})
            # A pair names an object as the pickle does, which need not be where the object says that it lives.
            known: list[Any] = [(value, name.replace(" ", ".")) for name, value in (allowed or {}).items()]
            with torch.serialization.safe_globals(known):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = _tensors(content, max_bytes)
    except DAMAGES as error:
        reason = (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")
        raise ValueError(f"Cannot read {path}: {reason:.500}.") from error
    if all(key.startswith(strip) for key in weights):
        weights = {key.removeprefix(strip): tensor for key, tensor in weights.items()}
    return Checkpoint(path, sha256(path), weights)


def _check_archive(path: Path, allowed: Mapping[str, Any]) -> None:
    """Check that a file is an archive of `torch.save` that holds tensors, before torch reads it."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        raise ValueError(
            "it is no archive of torch.save. Save files of torch before 1.6 anew with a current torch, and name "
            "safetensors files .safetensors"
        )
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError("it is damaged or was cut short. Download it again") from error
    with archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError(
                "it is a TorchScript archive, which holds code. Use the weights as .safetensors or as a state dict"
            )
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its archive is compressed, which torch.save never does. Do not load it")
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"its archive holds {len(pickles)} data.pkl, expected one. Download it again")
        with archive.open(pickles[0]) as file:
            _check_pickle(file, TENSOR_GLOBALS | set(allowed))


def _check_pickle(file: IO[bytes], known: set[str]) -> None:
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST") and argument not in known:
            name = str(argument).replace(" ", ".")
            raise ValueError(f"its pickle names {name!r:.200}, which weights do not need. Do not load it")
        # Other ways to name something, of which torch.save makes no use.
        if opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle takes the step {opcode.name}, which torch.save does not. Do not load it")


def _tensors(content: Any, max_bytes: int) -> dict[str, torch.Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"expected named tensors, got {type(state).__name__}. Pass a file of weights")
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"expected a tensor as {key!r:.200}, got {type(tensor).__name__}. Pass a file of weights")
    # A tensor may claim any shape on few stored values.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > max_bytes:
        raise ValueError(f"its tensors claim {claimed} bytes, expected at most {max_bytes}. Do not load it")
    return {str(key): tensor for key, tensor in state.items()}


def convert_keys(
    state_dict: Mapping[str, torch.Tensor], keys: Mapping[str, str | None], upstream: str
) -> dict[str, torch.Tensor]:
    """Return the weights of an upstream checkpoint under other names, by a table of patterns.

    Args:
        keys: pattern of a whole upstream key: the name here, with its groups as `\\1`. `{q,k,v}` in it cuts the rows
            in three, one for each name; `None` drops what has no counterpart here.
        upstream: what the checkpoint is expected to be, for errors.

    Raises:
        ValueError: a key is in no pattern, or not finite; names it.
    """
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        found = next(((match, new) for old, new in keys.items() if (match := re.fullmatch(old, key))), None)
        if found is None:
            raise ValueError(f"Unknown key {key!r}: expected {upstream}. Pass the released file as it is.")
        match, new = found
        if new is None:
            continue
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"The weights {key!r} are not finite. Download the file again.")
        # Of half precision the values stay; the models are saved in float32.
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        target: str = match.expand(new)
        parts = re.search(r"\{(.+)\}", target)
        if parts is None:
            converted[target] = tensor.contiguous()
            continue
        names = parts[1].split(",")
        if tensor.ndim == 0 or len(tensor) % len(names):
            raise ValueError(
                f"Misshapen key {key!r} of shape {list(tensor.shape)}: expected {len(names)} equal parts. Pass the "
                "released file as it is."
            )
        for name, rows in zip(names, tensor.chunk(len(names)), strict=True):
            converted[target.replace(parts[0], name)] = rows.contiguous()
    return converted


def load_weights(model: torch.nn.Module, converted: Mapping[str, torch.Tensor], upstream: str) -> None:
    """Load converted weights into a model, all of them and no others.

    What the model computes itself and upstream does not store must be among `converted`, taken from the model. A
    model on the meta device gets its memory here, once the shapes are known to be those of the weights.

    Raises:
        ValueError: a weight is missing, left over or of another shape; names it.
    """
    expected = model.state_dict()
    for problem, names in (
        ("lacks the weights that become", sorted(expected.keys() - converted.keys())),
        ("has weights of another architecture, which become", sorted(converted.keys() - expected.keys())),
    ):
        if names:
            raise ValueError(f"The checkpoint {problem} {names[0]!r}, of {len(names)}: expected {upstream}.")
    for name, tensor in converted.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"Misshapen weights, which become {name!r}: expected {list(expected[name].shape)}, got "
                f"{list(tensor.shape)}. Pass {upstream}, as it was released."
            )
    if any(tensor.is_meta for tensor in expected.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(dict(converted))


def width(weights: Mapping[str, torch.Tensor], key: str, axis: int = 0) -> int:
    """Return the size of one axis of the weights under an upstream key; ValueError names one that is missing."""
    if key not in weights:
        raise ValueError(f"Missing key {key!r}. Pass the released file as it is.")
    if axis >= weights[key].ndim:
        raise ValueError(
            f"Misshapen key {key!r} of shape {list(weights[key].shape)}. Pass the released file as it is."
        )
    return int(weights[key].shape[axis])


def count(weights: Mapping[str, torch.Tensor], pattern: str) -> int:
    """Return how many layers there are, numbered from 0 by the pattern's group; ValueError if a number is left out."""
    numbers = {int(match[1]): key for key in weights if (match := re.match(pattern, key))}
    # Else one key could ask for any number of layers.
    if numbers and max(numbers) != len(numbers) - 1:
        raise ValueError(
            f"Of the layers up to that of {numbers[max(numbers)]!r}, {len(numbers)} are there. Pass the released file "
            "as it is."
        )
    return len(numbers)
