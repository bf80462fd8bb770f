"""Fusions: how image features reach the decoder. One class each, selected by the model's spec."""

from mllama.config.spec import ModelSpec
from mllama.fusion.base import Fusion
from mllama.fusion.cross_attention import CrossAttentionFusion, TiledCrossAttentionFusion
from mllama.fusion.merge import MergeFusion
from mllama.fusion.prepend import PrependFusion

_FUSIONS = {
    None: Fusion,
    "merge": MergeFusion,
    "prepend": PrependFusion,
    "cross_attention": CrossAttentionFusion,
    "tiled_cross_attention": TiledCrossAttentionFusion,
}


def make_fusion(spec: ModelSpec) -> Fusion:
    """Build the fusion of a model."""
    return _FUSIONS[spec.fusion](spec)
