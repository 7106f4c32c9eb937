# Copyright 2026 The cmcr_hf authors. Licensed under the Apache License, Version 2.0.
"""Sources that are no repositories of transformers, and what reads them."""

import os
from typing import Any


def foreign_source(source: str | os.PathLike) -> Any:
    """Return the module that reads a source of another package, `None` for a model of transformers.

    It has `load_model(source, modalities, arguments)`, with the arguments of `from_pretrained`, and
    `load_parts(source)`, the parts of a processor by their names.
    """
    if not os.fspath(source).startswith("open_clip:"):
        return None
    try:
        from cmcr_hf.sources import open_clip
    except ImportError as error:
        raise ImportError(
            f"The source {os.fspath(source)!r} needs this package and open_clip ({error}). Install them: "
            'pip install "cmcr-hf[open-clip]".'
        ) from error
    return open_clip
