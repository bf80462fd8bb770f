"""`Tools`: what older scripts had CUDA kernels for, on this package's operators."""

from mllama.dropin.Tools.rmsnorm import FusedRMSNorm
from mllama.dropin.Tools.swiglu.FusedSwiglu import (
    FusedFeedForward,
    FusedSwiGLU,
    convert_feedforward_to_fused,
)

__all__ = ["FusedFeedForward", "FusedRMSNorm", "FusedSwiGLU", "convert_feedforward_to_fused"]
