"""`Model`: the folder of older scripts."""

from mllama.dropin._config import MLLAMAConfig
from mllama.dropin._multimodal import MllamaForConditionalGeneration

__all__ = ["MLLAMAConfig", "MllamaForConditionalGeneration"]
