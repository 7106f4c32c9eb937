"""Embed with a connected model by its name, loading no more of it than is used, and nothing before it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .cache import FileDigests

if TYPE_CHECKING:
    from ..modeling.modeling_cmcr import CMCRModel
    from ..modeling.processing_cmcr import CMCRProcessor

# Counts as part of a model's identity: raise it when the processor or the model gives other vectors.
FORMAT_VERSION = 1
MODALITIES = ("image", "audio", "point_cloud", "text")
MODEL_REMEDY = (
    "Pass a folder that `cmcr connect` wrote (OUTPUT/model or OUTPUT/connector), or the Hub id of a CMCRModel."
)


class Embedder:
    """A model that is told from others by the content of its files, and of which a tower is loaded at its first use.

    Args:
        name: folder or Hub id of a `CMCRModel`. Of the Hub, the commit that is in the local cache, else the newest.
        digests: what is known of the files of models.
        device: of the model (default: cuda where there is one).

    Raises:
        ValueError: there is no such model.
    """

    def __init__(self, name: str, digests: FileDigests, device: str | None = None) -> None:
        self._name, self._device = name, device
        self._models: dict[str, CMCRModel] = {}
        self._processor: CMCRProcessor | None = None
        path, self._revision = _find_config(name)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            kind = config.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"Cannot read {path}: {error}. {MODEL_REMEDY}") from error
        if kind != "cmcr":
            raise ValueError(
                f"Expected a CMCRModel in {name!r}, got {f'a {kind}' if kind else 'none'}. {MODEL_REMEDY}"
            )
        # A configuration that a class has saved names a space for each.
        able = config.get("default_spaces") or MODALITIES
        self.modalities = [modality for modality in MODALITIES if modality in able]
        content = [[name, self._revision]] if self._revision else _contents(path.parent, digests)
        if config.get("architectures") == ["CMCRConnector"]:
            # A connector comes with what its sources are now; those on the Hub are told by the configuration.
            folders = [Path(source.get("id", "")) for source in (config.get("sources") or {}).values()]
            content += [entry for folder in folders if folder.is_dir() for entry in _contents(folder, digests)]
        digests.save()
        # The sha256, in hexadecimal, of all that decides what a vector is.
        self.digest = hashlib.sha256(json.dumps([FORMAT_VERSION, content]).encode()).hexdigest()

    def check(self, modality: str) -> None:
        """Check that the model embeds a modality; ValueError names those that it does."""
        if modality not in self.modalities:
            raise ValueError(
                f"The model {self._name!r} embeds {' and '.join(self.modalities)}, not {modality}. Use another model."
            )

    def embed(self, modality: str, values: Sequence[str]) -> tuple[list[np.ndarray | None], list[str | None]]:
        """Return for each value a float32 unit vector and None, or None and why the value could not be read.

        Args:
            values: texts, or paths of images or audio files.

        Raises:
            ValueError: the model cannot be loaded, or does not embed the modality.
        """
        self.check(modality)
        import torch

        from ..training.embed import prepare

        model, processor = self._load(modality)
        reasons: list[str | None] = [None] * len(values)
        good = list(values)
        try:
            features = prepare(processor, modality, good)
        except ValueError:
            reasons = [_refusal(processor, modality, value) for value in values]
            good = [value for value, reason in zip(values, reasons, strict=True) if reason is None]
            if not good:
                return [None] * len(values), reasons
            features = prepare(processor, modality, good)
        with torch.inference_mode():
            outputs = getattr(model, f"get_{modality}_features")(**features.to(model.device))
        rows = iter(outputs.pooler_output.float().cpu().numpy())
        return [next(rows) if reason is None else None for reason in reasons], reasons

    def _load(self, modality: str) -> tuple[CMCRModel, CMCRProcessor]:
        if modality in self._models and self._processor is not None:
            return self._models[modality], self._processor
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError

        from ..public import CMCRModel, CMCRProcessor

        hub = {"revision": self._revision} if self._revision else {}
        try:
            model = CMCRModel.from_pretrained(self._name, modalities=[modality], dtype=torch.float32, **hub)
            self._processor = self._processor or CMCRProcessor.from_pretrained(self._name, **hub)
        except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
            raise ValueError(f"Cannot load the model {self._name!r}: {error} {MODEL_REMEDY}") from error
        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._models[modality] = model.to(device)
        return self._models[modality], self._processor


def _refusal(processor: CMCRProcessor, modality: str, value: str) -> str | None:
    from ..training.embed import prepare

    try:
        prepare(processor, modality, [value])
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _find_config(name: str) -> tuple[Path, str | None]:
    """Return the path of a model's config.json, and its commit where it is of the Hub."""
    folder = Path(name)
    if folder.exists():
        return folder / "config.json", None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
        path = path if isinstance(path, str) else hf_hub_download(name, "config.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load the model {name!r}: {error} {MODEL_REMEDY}") from error
    return Path(path), Path(path).parent.name


def _contents(folder: Path, digests: FileDigests) -> list[list[str]]:
    """Return name and sha256 of the files of a saved model, its card left out."""
    paths = sorted([*folder.glob("*"), *folder.glob("*_tokenizer/*")])
    return [
        [path.relative_to(folder).as_posix(), digests.digest(str(path.absolute()), path, path.stat())]
        for path in paths
        if path.is_file() and path.suffix != ".md" and not path.name.startswith(".")
    ]
