# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources that are no repositories of transformers, and what reads them."""

import os
from typing import Any


def foreign_source(source: str | os.PathLike) -> Any:
    """Return the module that reads a source of another package, `None` for a model of transformers.

    Such a source is `open_clip:NAME/TAG`, or a LAION-CLAP checkpoint by its file's name, `FILE.pt`. The module has
    `load_model(source, modalities, arguments)`, with the arguments of `from_pretrained`, and `load_parts(source)`, the
    parts of a processor by their names.
    """
    name = os.fspath(source)
    try:
        if name.startswith("open_clip:"):
            from cmcr_hf.sources import open_clip

            return open_clip
        if name.endswith(".pt"):
            from cmcr_hf.sources import laion_clap

            return laion_clap
    except ImportError as error:
        extra = "[open-clip]" if name.startswith("open_clip:") else ""
        raise ImportError(
            f'The source {name!r} needs this package ({error}). Install it: pip install "cmcr-hf{extra}".'
        ) from error
    return None
