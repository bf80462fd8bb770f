# ruff: noqa: F401
from mllama.dropin.layers import FusedFeedForward, FusedSwiGLU, convert_feedforward_to_fused
