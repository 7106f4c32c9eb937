"""C-MCR for transformers: connect pretrained contrastive spaces through the modality they share."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .modeling.configuration_cmcr import CMCRConfig
from .modeling.modeling_cmcr import CMCRConnector, CMCRConnectorOutput, CMCRModel, CMCROutput, CMCRProjector
from .modeling.processing_cmcr import CMCRProcessor

AutoConfig.register("cmcr", CMCRConfig)
AutoModel.register(CMCRConfig, CMCRModel)
AutoProcessor.register(CMCRConfig, CMCRProcessor)

__all__ = [
    "CMCRConfig",
    "CMCRConnector",
    "CMCRConnectorOutput",
    "CMCRModel",
    "CMCROutput",
    "CMCRProcessor",
    "CMCRProjector",
]
