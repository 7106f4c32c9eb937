# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Build and load source encoders, whole or with the towers of some modalities alone."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging
from transformers.utils.hub import resolve_revision

from .configuration_ulip import UlipConfig
from .foreign_sources_cmcr import foreign_source
from .modeling_ulip import UlipModel

logger = logging.get_logger(__name__)

# What `from_pretrained` passes on from a connector to its sources; `revision` and `subfolder` are each repository's
# own.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")

# How the two-tower models of transformers name what serves one modality alone; the rest (a logit scale) stays.
TOWER_PREFIXES = {
    "image": ("image", "vision", "visual"),
    "text": ("text",),
    "audio": ("audio",),
    "point_cloud": ("point",),
}


def build_source(config: PreTrainedConfig, modalities: Collection[str]) -> PreTrainedModel:
    """Build the towers of `modalities` of a source, with random weights or on the meta device."""
    config._attn_implementation = _source_attention(config, config._attn_implementation)
    # The Auto classes do not know ours where the code comes from the Hub.
    source = UlipModel._from_config(config) if config.model_type == "ulip" else AutoModel.from_config(config)
    remove_other_towers(source, modalities)
    return source


def split_source(source: str) -> tuple[str, str]:
    """Return what of a source's name may be a path, after what stands before it: of open_clip, `open_clip:NAME/`."""
    if not source.startswith("open_clip:"):
        return "", source
    name, slash, weights = source.partition("/")
    return name + slash, weights


def source_id(source: str | os.PathLike) -> str:
    """Return the name by which a source is found from any folder: that of a folder or file of the user is absolute."""
    name = os.fspath(source)
    prefix, path = split_source(name)
    # open_clip takes a tag, which has no suffix, before a file of that name.
    local = os.path.isfile(path) and os.path.splitext(path)[1] != "" if prefix else os.path.exists(path)
    return prefix + os.path.abspath(path) if local else name


def place_source(source: Any, arguments: Mapping[str, Any]) -> Any:
    """Place a source that no `from_pretrained` loads as its `device_map`, one device or "auto", and `dtype` say."""
    device = arguments.get("device_map")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return source.to(device=device, dtype=arguments.get("dtype")).eval()


def load_source(
    source: str | os.PathLike, revision: str | None, modalities: Collection[str], kwargs: dict
) -> tuple[PreTrainedModel, dict[str, str | None]]:
    """Load the towers of `modalities` of a source, and return them with the record by which it is found again.

    Of safetensors files the weights of other towers are not read.
    """
    source = source_id(source)
    foreign = foreign_source(source)
    if foreign is not None:
        return foreign.load_model(source, modalities, kwargs), {"id": source, "revision": None}
    revision = resolve_revision(
        source, revision, **{key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    )
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    found, _ = PreTrainedConfig.get_config_dict(source, revision=revision, **hub)
    config_class: Any = UlipConfig if found.get("model_type") == "ulip" else AutoConfig
    config = config_class.from_pretrained(source, revision=revision, **hub)
    attention = kwargs.get("attn_implementation")
    if attention is not None:
        kwargs = {**kwargs, "attn_implementation": _source_attention(config, attention)}
    source_class: Any = _source_class(config)

    def build(self: PreTrainedModel, *args: Any, **arguments: Any) -> None:
        source_class.__init__(self, *args, **arguments)
        remove_other_towers(self, modalities)

    # Under the name of its base, by which transformers finds how to read old checkpoints.
    towers: Any = type(source_class.__name__, (source_class,), {"__init__": build, "__module__": __name__})
    model = towers.from_pretrained(source, **({} if revision is None else {"revision": revision}), **kwargs)
    model.__class__ = source_class
    return model, {"id": source, "revision": getattr(revision, "resolved", revision)}


def _source_class(config: PreTrainedConfig) -> Any:
    return UlipModel if config.model_type == "ulip" else MODEL_MAPPING[type(config)]


def remove_other_towers(source: PreTrainedModel, modalities: Collection[str]) -> None:
    """Remove the towers of a two-tower model that serve none of `modalities`."""
    for modality, prefixes in TOWER_PREFIXES.items():
        if modality in modalities:
            continue
        for name in [name for name, _ in source.named_children() if name.startswith(prefixes)]:
            delattr(source, name)
            ignored = {*(source._keys_to_ignore_on_load_unexpected or ()), rf"(^|\.){name}\."}
            source._keys_to_ignore_on_load_unexpected = ignored


def _source_attention(config: PreTrainedConfig, requested: str | None) -> str | None:
    """Return the attention for a source: one request for SDPA reaches every source that has it."""
    model_class: Any = _source_class(config)
    if requested == "sdpa" and not model_class._supports_sdpa:
        logger.warning_once(f"{model_class.__name__} has no SDPA attention and keeps its eager one.")
        return "eager"
    return requested
