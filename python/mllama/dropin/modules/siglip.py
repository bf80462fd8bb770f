# ruff: noqa: F401
from mllama.dropin.vision import (
    SiglipAttention,
    SiglipEncoder,
    SiglipEncoderLayer,
    SiglipMLP,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionEmbeddings,
    SiglipVisionTransformer,
)
from mllama.dropin.vision import SiglipEncoderLayer as SiglipVisionEncoder
from mllama.dropin.vision import SiglipVisionEmbeddings as SiglipVisionEmbedding
