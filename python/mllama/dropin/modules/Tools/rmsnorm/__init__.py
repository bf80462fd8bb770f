# ruff: noqa: F401
from mllama.dropin.layers import RMSNorm as FusedRMSNorm
