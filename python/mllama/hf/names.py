"""Classes of transformers used by the command line and the modules for older scripts."""

from transformers import (
    BatchFeature,
    Cache,
    DynamicCache,
    GemmaConfig,
    LlamaConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
    __version__,
)
from transformers.processing_utils import ProcessorMixin

__all__ = [
    "BatchFeature",
    "Cache",
    "DynamicCache",
    "GemmaConfig",
    "LlamaConfig",
    "PaliGemmaConfig",
    "PretrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "ProcessorMixin",
    "SiglipVisionModel",
    "__version__",
]
