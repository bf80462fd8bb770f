"""`siglip` of older scripts: the classes of `modeling_siglip` under the names these files give
their parts.

Weights are `vision_model.embedding.*`, `vision_model.encoder.layers.N.{layernorm1, self_attn,
layernorm2, mlp}.*` and `vision_model.layernorm.*`.
"""

from mllama.dropin import modeling_siglip
from mllama.dropin._names import older_names
from mllama.dropin.modeling_siglip import (
    SiglipAttention,
    SiglipMLP,
    SiglipVisionConfig,
    SiglipVisionEmbeddings,
)

__all__ = [
    "SiglipAttention",
    "SiglipEncoder",
    "SiglipEncoderLayer",
    "SiglipMLP",
    "SiglipModel",
    "SiglipVisionConfig",
    "SiglipVisionEmbedding",
    "SiglipVisionEmbeddings",
    "SiglipVisionEncoder",
    "SiglipVisionTransformer",
]

SiglipVisionEmbedding = SiglipVisionEmbeddings


@older_names(layer_norm1="layernorm1", layer_norm2="layernorm2")
class SiglipVisionEncoder(modeling_siglip.SiglipEncoderLayer):
    """Pre-norm transformer block: layernorm1, self_attn, layernorm2, mlp. One layer, for all its
    name says.
    """


SiglipEncoderLayer = SiglipVisionEncoder


class SiglipEncoder(modeling_siglip.SiglipEncoder):
    """The layers."""

    layer_class = SiglipVisionEncoder


@older_names(embeddings="embedding", post_layernorm="layernorm")
class SiglipVisionTransformer(modeling_siglip.SiglipVisionTransformer):
    """embedding, encoder and layernorm."""

    encoder_class = SiglipEncoder


class SiglipModel(modeling_siglip.SiglipVisionModel):
    """The tower as `vision_model`; pixels -> [B, patches, hidden_size], a bare tensor."""

    transformer_class = SiglipVisionTransformer
