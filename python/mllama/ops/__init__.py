"""The operators: public functions, each with its reference in plain torch. Importing this package registers them with torch."""

from mllama.ops.attention import attention, attention_weights

__all__ = ["attention", "attention_weights"]
