"""The model under evaluation: loaded once, what it embeds kept in stores, so that a second run embeds nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..modeling.configuration_cmcr import CMCRConfig
from ..modeling.modeling_cmcr import CMCRModel
from ..modeling.processing_cmcr import PARTS, CMCRProcessor
from ..modeling.towers_cmcr import TOWER_PREFIXES
from ..output import connector_digest, weights_digest
from ..training.data import Items
from ..training.embed import embed
from ..training.store import EmbeddingStore
from .result import shown

# Of a shard whose rows are wide: a quarter of a gigabyte in float32.
_SHARD_NUMBERS = 2**26
REMEDY = "Pass a folder that `cmcr connect` wrote (OUTPUT/model or OUTPUT/connector), or the Hub id of a CMCRModel."


def load_config(name: str, modalities: Collection[str] | None = None) -> CMCRConfig:
    """Load the configuration of a model.

    Raises:
        ValueError: there is no such model, or it does not embed a modality; says what it is.
    """
    with _named_errors(name):
        # transformers would take a file for a checkpoint or a configuration, by its name.
        kind = "file" if Path(name).is_file() else CMCRConfig.get_config_dict(name)[0].get("model_type")
        config = CMCRConfig.from_pretrained(name) if kind == CMCRConfig.model_type else None
    if config is None:
        raise ValueError(f"Expected a CMCRModel in {name!r}, got {f'a {kind}' if kind else 'none'}. {REMEDY}")
    able = config.embedded_modalities
    if lacking := [modality for modality in modalities or () if modality not in able]:
        raise ValueError(
            f"{name!r} embeds {', '.join(able)}, expected {' and '.join(modalities or ())}. Pass a model that was "
            f"connected with a source of {' and '.join(lacking)}."
        )
    return config


def load_model(name: str, modalities: Collection[str] | None = None) -> tuple[CMCRModel, CMCRProcessor]:
    """Load a model, with the towers of some modalities alone, and its processor; errors as of [`load_config`]."""
    load_config(name, modalities)
    with _named_errors(name):
        model = CMCRModel.from_pretrained(name, modalities=modalities, dtype=torch.float32)
        return model, CMCRProcessor.from_pretrained(name)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"Cannot load the model {name!r}: {error} {REMEDY}") from error


class EvaluatedModel:
    """A connected model whose sources embed items into stores below a folder; the connector projects what they hold.

    A store is known by the weights of the tower, its preprocessing and the items: another of these makes another store
    beside it, and another connector on the same sources uses the one that is there.

    Args:
        name: folder or Hub id of a `CMCRModel`.
        folder: of the evaluation; stores are kept in `stores` below it.
        modalities: what is embedded; the towers of others are not loaded.

    Raises:
        ValueError: there is no such model, or it does not embed a modality.

    Example:
        >>> model = EvaluatedModel("runs/demo/model", Path("runs/evaluate/mine"), modalities=["image", "text"])
        >>> source = model.source_embeds(Items.listed("text", ["a dog", "a cat"]))   # (2, width of the source)
        >>> shared = model.project(source, "text")                                    # (2, projection_dim)
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        modalities: Collection[str] | None = None,
        device: str = "cpu",
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        self.name, self.folder = name, folder
        self.model, self.processor = load_model(name, modalities)
        self.model.to(device)  # type: ignore[arg-type]
        self.batch_size, self.progress = batch_size, progress
        self._records: dict[tuple[str, str], dict[str, str]] = {}

    def source_embeds(self, items: Items, space: str | None = None) -> torch.Tensor:
        """Return `(items, dim)` float32 unit rows of a source's own space, on the CPU, in the order of the items.

        Args:
            space: the source; by default that which the modality goes through.

        Raises:
            ValueError: an item cannot be read; names it.
        """
        return self.source_store(items, space).tensor().float()

    def source_store(
        self, items: Items, space: str | None = None, *, encoder: Any = None, strict: bool = True
    ) -> EmbeddingStore:
        """Return the store of what `source_embeds` returns, to read a part of it at a time.

        Args:
            encoder: what embeds the items in place of the source, of which it is made, with a width `dim`, such as a
                [`PatchEncoder`].
            strict: whether an item that cannot be read is an error, or is left out of the store.
        """
        space = self.model.config.space_of(items.modality, space)
        record = self.tower_record(space, items.modality)
        described = [record, items.fingerprint, *([] if encoder is None else [type(encoder).__name__])]
        described += [] if strict else ["readable"]
        known = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        return embed(
            self.model.sources[space] if encoder is None else encoder,
            self.processor,
            items,
            self.folder / "stores" / f"{space}-{items.modality}-{known[:12]}",
            space=space,
            record=record,
            dim=(self.model.config.projectors or {})[space]["input_dim"] if encoder is None else encoder.dim,
            batch_size=self.batch_size,
            strict=strict,
            progress=self.progress,
            shard_rows=None if encoder is None else max(1, _SHARD_NUMBERS // encoder.dim),
        )

    @torch.inference_mode()
    def project(self, embeds: torch.Tensor, modality: str, space: str | None = None) -> torch.Tensor:
        """Return `(rows, projection_dim)` float32 unit rows of the shared space for those of a source, on the CPU."""
        connector, space = self.model.connector, self.model.config.space_of(modality, space)
        parts = [connector.project(rows.to(connector.device), space, modality) for rows in embeds.split(8192)]
        return torch.cat([part.float().cpu() for part in parts])

    def embeds(self, items: Items, space: str | None = None) -> torch.Tensor:
        """Return `(items, projection_dim)` float32 unit rows of the shared space, on the CPU."""
        return self.project(self.source_embeds(items, space), items.modality, space)

    def record(self) -> dict[str, Any]:
        """Return what tells the model from another: name, commit, connector and sources."""
        config = self.model.config
        return {
            "name": shown(self.name),
            "revision": getattr(config, "_commit_hash", None),
            "objective": config.objective,
            "connector_sha256": connector_digest(self.model.connector),
            "sources": {
                space: {"id": shown(str(source["id"])), "revision": source.get("revision")}
                for space, source in (config.sources or {}).items()
            },
            "towers_sha256": {
                f"{space}_{modality}": record["revision"] for (space, modality), record in self._records.items()
            },
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }

    def tower_record(self, space: str, modality: str) -> dict[str, str]:
        """Describe a tower for its stores: by its weights, since a name in a model's record may lead elsewhere now."""
        if (space, modality) not in self._records:
            others = tuple(
                prefix for other, prefixes in TOWER_PREFIXES.items() if other != modality for prefix in prefixes
            )
            state = self.model.sources[space].state_dict()
            weights = {name: tensor for name, tensor in state.items() if not name.startswith(others)}
            source = self.model.sources[space].config.to_dict()
            described = [
                {
                    name: value
                    for name, value in source.items()
                    if name not in ("_name_or_path", "transformers_version")
                },
                self.processor.to_dict(),
                getattr(self.processor, PARTS[space, "text"]).get_vocab() if modality == "text" else None,
            ]
            digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
            identity = ((self.model.config.sources or {}).get(space) or {}).get("id") or self.name
            revision = weights_digest(weights)
            self._records[space, modality] = {"id": shown(identity), "revision": revision, "config_hash": digest}
        return self._records[space, modality]
