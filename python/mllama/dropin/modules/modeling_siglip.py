# ruff: noqa: F401
from mllama.dropin.vision import (
    SiglipAttention,
    SiglipEncoder,
    SiglipEncoderLayer,
    SiglipMLP,
    SiglipVisionConfig,
    SiglipVisionEmbeddings,
    SiglipVisionModel,
    SiglipVisionTransformer,
)
