"""`Tools.rmsnorm`: the norm that adds a residual on its way."""

from mllama.dropin._text import RMSNorm as FusedRMSNorm

__all__ = ["FusedRMSNorm"]
