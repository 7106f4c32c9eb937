"""The public names, which transformers' Auto classes know once this is imported, as `import cmcr_hf` does."""

# Before the import of transformers, which fails where that of torchvision does.
from .sources.upstream import repair_torchvision

repair_torchvision()

# ruff: noqa: E402
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .modeling.clap_extraction_cmcr import CMCRFeatureExtractor
from .modeling.configuration_cmcr import CMCRConfig
from .modeling.configuration_ulip import UlipConfig
from .modeling.modeling_cmcr import CMCRConnector, CMCRConnectorOutput, CMCRModel, CMCROutput, CMCRProjector
from .modeling.modeling_ulip import UlipModel, UlipOutput
from .modeling.processing_cmcr import CMCRProcessor
from .sources.open_clip import OpenClipConfig, OpenClipModel

AutoConfig.register("cmcr", CMCRConfig)
AutoConfig.register("open_clip", OpenClipConfig)
AutoConfig.register("ulip", UlipConfig)
AutoModel.register(CMCRConfig, CMCRModel)
AutoModel.register(OpenClipConfig, OpenClipModel)
AutoModel.register(UlipConfig, UlipModel)
AutoModelForZeroShotImageClassification.register(CMCRConfig, CMCRModel)
AutoProcessor.register(CMCRConfig, CMCRProcessor)
AutoFeatureExtractor.register(CMCRConfig, CMCRFeatureExtractor)

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
