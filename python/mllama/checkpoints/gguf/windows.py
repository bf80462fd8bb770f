"""Fields of Gemma 2's and 3's GGUF files beyond Llama's, and llama.cpp's defaults for them."""

from typing import Any, NamedTuple

from mllama.checkpoints.gguf.header import GgufHeader


class _Known(NamedTuple):
    """llama.cpp's constants of an architecture (llama-model.cpp).

    Attributes:
        window: default window; 0 is none.
        period: every period-th layer attends to all positions.
        softcaps: of the attention scores and of the logits; 0 is none.
        large: number of layers of the 27B model, whose scale follows from the width.
    """

    window: int
    period: int
    softcaps: tuple[float, float]
    large: int


WINDOWED = {"gemma2": _Known(4096, 2, (50.0, 30.0), 46), "gemma3": _Known(0, 6, (0.0, 0.0), 62)}


def window_arguments(
    header: GgufHeader, architecture: str, sizes: dict[str, Any], rope: dict[str, Any]
) -> dict[str, Any]:
    """Fields of a Gemma 2 or 3 config that Gemma 1 does not have.

    Args:
        header: the file's header.
        architecture: "gemma2" or "gemma3".
        sizes: the fields that every config has.
        rope: rotary parameters of the layers without a window.

    Raises:
        ValueError: values have the wrong type or are invalid.
    """
    known, layers = WINDOWED[architecture], sizes["num_hidden_layers"]
    window = header.get(f"{architecture}.attention.sliding_window", int, known.window)
    period = header.get(f"{architecture}.attention.sliding_window_pattern", int, known.period)
    for name, value, least in (
        ("sliding_window", window, 0),
        ("sliding_window_pattern", period, 1),
    ):
        if value < least:
            raise ValueError(
                f"{header.path}: {architecture}.attention.{name} must be at least {least}, "
                f"got {value}"
            )
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    softcaps = {
        name: header.get(f"{architecture}.{name}", float, default) or None
        for name, default in zip(names, known.softcaps, strict=True)
    }
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    arguments = softcaps | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == known.large else sizes["head_dim"],
        "sliding_window": window or known.window or 4096,
        "layer_types": [
            "sliding_attention" if window and (index + 1) % period else "full_attention"
            for index in range(layers)
        ],
        "rope_parameters": rope,
    }
    if architecture == "gemma3":
        base = header.get("gemma3.rope.freq_base_swa", float, 10000.0)
        sliding = {"rope_type": "default", "rope_theta": base}
        arguments["rope_parameters"] = {"full_attention": rope, "sliding_attention": sliding}
    return arguments
