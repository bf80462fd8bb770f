"""Checks of config fields. Each raises ValueError naming the owner, the field and the value."""

from collections.abc import Collection
from typing import Any

# Head sizes of the attention operator.
HEAD_DIM_MIN, HEAD_DIM_MAX = 1, 256
ROPE_TYPES = ("default", "linear", "llama3")
TEXT_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
# transformers' names, without those that have learned parameters (prelu, xielu).
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"),
    *("gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"),
    *("mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus"),
    *("swish", "tanh"),
)
VISION_FEATURES = ("last", "pre_norm")
PROJECTORS = ("mlp", "linear")
FUSIONS = ("merge", "prepend", "cross_attention")
POOLINGS = ("average", "learned")
CROSS_ATTENTION_EVERY = 4  # layers; the default
LAYERS_MAX = 2**12  # of a decoder, whose spec lists them; the largest released one has 126
TILES_MAX = 64  # of an image; released models have 4
# Larger sizes overflow torch's 32-bit indices; larger numbers are infinite in float32.
SIZE_MAX, NUMBER_MAX = 2**31 - 1, 3.4028234663852886e38


def check_size(owner: str, name: str, value: Any, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}: {name} must be an integer of at least {minimum}, got {value!r}")
    if value > SIZE_MAX:
        raise ValueError(f"{owner}: {name} must be at most {SIZE_MAX}")


def check_number(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{owner}: {name} must be a number above 0, got {value!r}")
    if value > NUMBER_MAX:
        raise ValueError(f"{owner}: {name} must be a number that float32 can hold")


def check_choice(owner: str, name: str, value: Any, choices: Collection) -> None:
    # Compared by type too: 1 is not True, 0 is not False.
    if not any(value == choice and _is_bool(value) == _is_bool(choice) for choice in choices):
        raise ValueError(
            f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def check_flag(owner: str, name: str, value: Any) -> None:
    check_choice(owner, name, value, (True, False))


def check_kind(owner: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        word = {dict: "an object (dict)", list: "a list"}[kind]
        raise ValueError(f"{owner}: {name} must be {word}, got {value!r}")


def check_multiple(owner: str, hidden_size: int, heads: int, heads_name: str) -> None:
    if hidden_size % heads:
        raise ValueError(
            f"{owner}: hidden_size {hidden_size} is not a multiple of {heads_name} {heads}"
        )


def check_head_dim(owner: str, hidden_size: int, heads: int, heads_name: str) -> None:
    """Raise ValueError unless `heads` divides the width into head sizes that the attention operator
    supports.
    """
    check_multiple(owner, hidden_size, heads, heads_name)
    check_head_size(owner, f"head_dim (hidden_size / {heads_name})", hidden_size // heads)


def check_head_size(owner: str, name: str, head_dim: Any) -> None:
    check_size(owner, name, head_dim)
    if not HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX:
        raise ValueError(
            f"{owner}: {name} must be {HEAD_DIM_MIN} to {HEAD_DIM_MAX}, got {head_dim}"
        )


def check_reference(reference: str) -> None:
    """Raise ValueError unless reference is "meta" or "hf"."""
    check_choice("model", "reference", reference, ("meta", "hf"))
