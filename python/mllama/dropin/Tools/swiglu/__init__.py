"""`Tools.swiglu`: the gated activation, with the projections before it."""

from mllama.dropin.Tools.swiglu.FusedSwiglu import (
    FusedFeedForward,
    FusedSwiGLU,
    convert_feedforward_to_fused,
)

__all__ = ["FusedFeedForward", "FusedSwiGLU", "convert_feedforward_to_fused"]
