"""Read upstream checkpoints as named tensors: weights alone, of bounded size, nothing in them run."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cmcr_hf.conversion.pickles import Call, Name, Outside, read_pickle
from cmcr_hf.durable import sha256

# What a storage of a pickle is named after, and what it holds.
DTYPES = {
    f"torch {kind}Storage": getattr(torch, dtype)
    for kind, dtype in {
        "BFloat16": "bfloat16",
        "Bool": "bool",
        "Byte": "uint8",
        "Char": "int8",
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "Int": "int32",
        "Long": "int64",
        "Short": "int16",
    }.items()
}
REBUILD, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
# All that the pickle of a released file may name: tensors, and what stands beside them, which is not used: the options
# of a training, and numbers of numpy.
NAMES = {
    "collections OrderedDict",
    REBUILD,
    PARAMETER,
    *DTYPES,
    "argparse Namespace",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "_codecs encode",
}
# Those of the released files have less than 1 MB and 100,000 steps.
MAX_PICKLE_BYTES, MAX_STEPS = 2**25, 4_000_000
MAX_ENTRIES = 100_000
MAX_AXES = 8
# What a key tells of the file that it is in, for those who name the wrong kind.
KINDS = {
    "Head_A.": "cmcr",
    "Head1.": "ex-mcr",
    "audio_branch.": "laion-clap",
    "point_encoder.": "ulip",
    "visual.conv1.": "open-clip",
}


@dataclass(frozen=True)
class Checkpoint:
    """The weights of an upstream file, by upstream's own names without `module.`, and what identifies the file."""

    path: Path
    sha256: str
    weights: dict[str, torch.Tensor]


def read_checkpoint(path: str | Path, *, max_bytes: int) -> Checkpoint:
    """Read the tensors of a `.pt` file, or of the `state_dict` in one, or of a `.safetensors` file.

    The pickle of a `.pt` file is read as data (see [`read_pickle`]), and its tensors are mapped from the disk: what is
    not used, such as an optimizer's state, is not read. `module.` is left out where all keys start with it.

    Args:
        max_bytes: that the file, and all its weights together, may have.

    Raises:
        ValueError: the file is missing, damaged, too large, compressed or of another kind; its pickle names what
            weights do not need; or a key holds no tensor. Names the file and the reason.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ValueError("there is no such file. Check the path.")
        if not path.is_file():
            raise ValueError("it is no file. Name the file of weights.")
        if path.stat().st_size > max_bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {max_bytes}. Name another file.")
        weights = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path)
        # A tensor may claim any shape on few stored values.
        claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        if claimed > max_bytes:
            raise ValueError(f"its tensors claim {claimed} bytes, expected at most {max_bytes}. Do not load it.")
        digest = sha256(path)
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error
    except ValueError as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): tensor for key, tensor in weights.items()}
    return Checkpoint(path, digest, weights)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights = load_file(path)
    # KeyError: a type of numbers that this torch does not have.
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"it is damaged, cut short or no safetensors file ({error!s:.200}). Download it again, and name files of "
            "torch.save .pt."
        ) from error
    if not weights:
        raise ValueError("it holds no tensors. Name a file of weights.")
    return weights


def _read_archive(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        start = file.read(512)
    if not start.startswith(b"PK\x03\x04"):
        if start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs") or len(start) < 512:
            raise ValueError("it is no archive of torch.save, but what a failed download leaves. Download it again.")
        raise ValueError(
            "it is no archive of torch.save. Save files of torch before 1.6 anew with a current torch, and name "
            "safetensors files .safetensors."
        )
    try:
        archive = zipfile.ZipFile(path)
    # NotImplementedError: a version of zip that torch does not write.
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise ValueError("it is damaged or was cut short. Download it again.") from error
    with archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(name.endswith("/constants.pkl") for name in entries):
            raise ValueError(
                "it is a TorchScript archive, which holds code. Use the weights as .safetensors or as a state dict."
            )
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
        if packed or sum(entry.file_size for entry in entries.values()) > path.stat().st_size:
            raise ValueError("its archive is compressed, which torch.save never does. Do not load it.")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(archive.infolist()) != len(entries) or len(entries) > MAX_ENTRIES:
            raise ValueError("its archive holds not one data.pkl with its data, each once. Download it again.")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError(
                f"its pickle has more than {MAX_PICKLE_BYTES} bytes, which weights need not. Do not load it."
            )
        root = pickles[0].removesuffix("data.pkl")
        try:
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("it was saved on a machine of another byte order. Save it anew on a usual one.")
            content = read_pickle(archive.read(pickles[0]), NAMES, max_steps=MAX_STEPS)
            state = content.get("state_dict", content) if isinstance(content, dict) else content
            if not isinstance(state, dict) or not state:
                raise ValueError("it holds no named tensors. Name a file of weights.")
            storages = _Storages(path, archive, root)
            return {str(key): storages.tensor(str(key), value) for key, value in state.items()}
        except (zipfile.BadZipFile, EOFError, struct.error) as error:
            raise ValueError(f"it is damaged ({error!s:.200}). Download it again.") from error


class _Storages:
    """The records of an archive that tensors are made of, mapped from the file, each checked once."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str) -> None:
        self._path, self._archive, self._root = path, archive, root
        self._file = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        self._known: dict[str, torch.UntypedStorage] = {}

    def tensor(self, key: str, value: Any) -> torch.Tensor:
        """Return the tensor that a pickle describes."""
        if isinstance(value, Call) and value.name == PARAMETER and value.arguments:
            value = value.arguments[0]
        match value:
            case Call(
                name, (Outside(("storage", Name(kind), str(record), _, int(number))), offset, size, stride, *_)
            ) if name == REBUILD and kind in DTYPES:
                pass
            case _:
                found = type(value).__name__ if not isinstance(value, Call) else value.name.replace(" ", ".")
                raise ValueError(f"expected a tensor as {key!r:.200}, got {found:.200}. Name a file of weights.")
        dtype = DTYPES[kind]
        axes = (*size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (-1,)
        whole = all(type(axis) is int and axis >= 0 for axis in (offset, number, *axes))
        if not whole or len(size) != len(stride) or len(size) > MAX_AXES:
            raise ValueError(f"the tensor {key!r:.200} has no shape. Download it again.")
        last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
        if 0 not in size and last >= number:
            raise ValueError(f"the tensor {key!r:.200} has more numbers than its record. Download it again.")
        storage = self._storage(key, record, number * dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)

    def _storage(self, key: str, record: str, length: int) -> torch.UntypedStorage:
        name = f"{self._root}data/{record}"
        try:
            entry = self._archive.getinfo(name)
        except KeyError as error:
            raise ValueError(f"the tensor {key!r:.200} has no record {name!r:.200}. Download it again.") from error
        if entry.file_size < length:
            raise ValueError(f"the record {name!r:.200} of {key!r:.200} is too short. Download it again.")
        if name not in self._known:
            # Reads the record through, and compares its checksum.
            with self._archive.open(entry) as stream:
                while stream.read(2**20):
                    pass
            with self._path.open("rb") as file:
                file.seek(entry.header_offset)
                _, name_length, extra_length = struct.unpack("<26sHH", file.read(30))
            start = entry.header_offset + 30 + name_length + extra_length
            self._known[name] = self._file[start : start + entry.file_size]
        return self._known[name]


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
            raise ValueError(f"Unknown key {key!r}: expected {upstream}. {_hint(state_dict, keys)}.")
        match, new = found
        if new is None:
            continue
        # Of half precision the values stay; the models are saved in float32.
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"The weights {key!r} are not finite in float32. Download the file again.")
        if key.endswith("running_var") and bool((tensor < 0).any()):
            raise ValueError(f"The variances {key!r} are below 0. Download the file again.")
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


def _hint(state_dict: Mapping[str, torch.Tensor], keys: Mapping[str, str | None]) -> str:
    """Say what to do with a checkpoint that a table of keys does not know whole, or not at all."""
    if not any(re.fullmatch(pattern, key) for pattern in keys for key in state_dict):
        for start, kind in KINDS.items():
            if any(key.startswith(start) for key in state_dict):
                return f"It looks like a file for `cmcr convert {kind}`"
    return "Pass the released file as it is"


def load_weights(model: torch.nn.Module, converted: Mapping[str, torch.Tensor], upstream: str) -> None:
    """Load converted weights into a model, all of them and no others.

    What the model computes itself and upstream does not store must be among `converted`, taken from the model. A
    model on the meta device gets its memory here, once the shapes are known to be those of the weights.

    Raises:
        ValueError: a weight is missing, left over or of another shape; names it.
    """
    expected = model.state_dict()
    for problem, names in (
        ("lacks weights, such as those that become", sorted(expected.keys() - converted.keys())),
        ("has weights of another architecture, such as those that become", sorted(converted.keys() - expected.keys())),
    ):
        if names:
            raise ValueError(f"The checkpoint {problem} {names[0]!r}. Pass {upstream}, whole.")
    for name, tensor in converted.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"Misshapen weights, which become {name!r}: expected {list(expected[name].shape)}, got "
                f"{list(tensor.shape)}. Pass {upstream}, as it was released."
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"Expected {expected[name].dtype} for the weights that become {name!r}, got {tensor.dtype}. Pass "
                f"{upstream}, as it was released."
            )
    if any(tensor.is_meta for tensor in expected.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(dict(converted))


def width(weights: Mapping[str, torch.Tensor], key: str, axis: int = 0) -> int:
    """Return the size of one axis of the weights under an upstream key; ValueError names one that is missing."""
    if key not in weights:
        raise ValueError(f"Missing key {key!r}. Pass the released file as it is.")
    if axis >= weights[key].ndim or weights[key].shape[axis] == 0:
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
