# ruff: noqa: F401
from mllama.dropin.vision import OlderSiglipEncoder as SiglipEncoder
from mllama.dropin.vision import OlderSiglipTransformer as SiglipVisionTransformer
from mllama.dropin.vision import (
    SiglipAttention,
    SiglipMLP,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionEmbeddings,
    SiglipVisionEncoder,
)
from mllama.dropin.vision import SiglipVisionEmbeddings as SiglipVisionEmbedding
from mllama.dropin.vision import SiglipVisionEncoder as SiglipEncoderLayer
