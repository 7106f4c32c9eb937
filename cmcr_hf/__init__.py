"""C-MCR for transformers: connect pretrained contrastive spaces through the modality they share."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The import of transformers takes seconds. The `cmcr` command spends them where it embeds something: a known search
# and every --help answer at once. In its process alone, the names come, and are registered, with their first use.
if TYPE_CHECKING or not sys.argv or Path(sys.argv[0]).name != "cmcr":
    from .public import (
        CMCRConfig,
        CMCRConnector,
        CMCRConnectorOutput,
        CMCRModel,
        CMCROutput,
        CMCRProcessor,
        CMCRProjector,
        UlipConfig,
        UlipModel,
        UlipOutput,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(".public", __name__), name)


__all__ = [
    "CMCRConfig",
    "CMCRConnector",
    "CMCRConnectorOutput",
    "CMCRModel",
    "CMCROutput",
    "CMCRProcessor",
    "CMCRProjector",
    "UlipConfig",
    "UlipModel",
    "UlipOutput",
]
