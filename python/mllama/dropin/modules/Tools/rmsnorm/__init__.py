from mllama.dropin.layers import RMSNorm as FusedRMSNorm  # noqa: F401
