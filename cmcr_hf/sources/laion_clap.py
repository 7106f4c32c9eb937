"""LAION-CLAP checkpoints as audio-text sources, converted while they are read: `clap="630k-fusion-best.pt"`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import ClapModel

from ..conversion.checkpoint import read_checkpoint
from ..conversion.convert_laion_clap import MAX_BYTES, clap_config, feature_extractor, read_clap
from ..modeling.processing_cmcr import load_tokenizer
from ..modeling.towers_cmcr import place_source, remove_other_towers

TOKENIZER = "FacebookAI/roberta-base"


def load_model(source: str | os.PathLike, modalities: Collection[str], arguments: Mapping[str, Any]) -> ClapModel:
    """Read the towers of `modalities` of a LAION-CLAP file.

    Args:
        arguments: those of `from_pretrained`, of which `dtype`, and as `device_map` one device, count.

    Raises:
        ValueError: as for [`read_clap`].
    """
    model, _ = read_clap(Path(source))
    remove_other_towers(model, modalities)
    placed: ClapModel = place_source(model, arguments)
    return placed


def load_parts(source: str | os.PathLike) -> dict[str, Any]:
    """Return feature extractor and tokenizer of a LAION-CLAP file, as the parts of a [`CMCRProcessor`].

    The tokenizer, RoBERTa's, is taken from the file's folder where it is there, else from the Hub.

    Raises:
        ValueError: as for [`read_clap`].
        OSError: the tokenizer is neither beside the file nor on the Hub.
    """
    config = clap_config(read_checkpoint(Path(source), max_bytes=MAX_BYTES).weights)
    folder = Path(source).parent
    beside = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return {
        "feature_extractor": feature_extractor(config),
        "clap_tokenizer": load_tokenizer(folder if beside else TOKENIZER),
    }
