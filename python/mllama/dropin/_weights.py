"""Weights under Hugging Face's names into a `Llama3Model`."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mllama.dropin._text import Llama3Model
from mllama.lora import Linear_LORA

_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_LAYER = (
    *_ATTENTION,
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


def assign(left: torch.Tensor, right: Any, tensor_name: str = "unknown") -> nn.Parameter:
    """`right`, a tensor or an array, as a new parameter: in left's dtype, on left's device unless
    that is meta, trained as left is.

    Raises:
        ValueError: the shapes differ.
    """
    right = right.detach() if isinstance(right, torch.Tensor) else torch.tensor(right)
    if left.shape != right.shape:
        raise ValueError(
            f"tensor {tensor_name!r} must be {list(left.shape)}, as the model's, got {list(right.shape)}"
        )
    device = right.device if left.is_meta else left.device
    trained = left.requires_grad if isinstance(left, nn.Parameter) else True
    return nn.Parameter(right.to(device, left.dtype, copy=True), requires_grad=trained)


def load_weights_into_llama(
    model: Llama3Model, param_config: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """Put a Llama's weights under Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`)
    into a model: all of them, or none.

    A linear layer that was converted to LoRA gets the weight it was made around. The head is the
    embedding matrix's where `params` has no `lm_head.weight`.

    Args:
        model: of a dict, changed in place.
        param_config: its `n_layers` is read.
        params: {name: tensor or array}.

    Raises:
        TypeError: the model is another.
        ValueError: n_layers is not the model's, names are missing, or a tensor has another shape.
    """
    if not isinstance(model, Llama3Model) or model.from_config:
        raise TypeError(
            f"model must be a Llama3Model of a dict, which has the output head, got {type(model).__name__}"
        )
    if param_config.get("n_layers") != len(model.trf_blocks):
        raise ValueError(
            f"param_config: n_layers must be {len(model.trf_blocks)}, as the model's, got {param_config.get('n_layers')}"
        )
    modules = {
        name: model.get_submodule(name) for name in _names(len(model.trf_blocks))
    }  # by the package's names, which are these
    sources = {name: f"model.{name}.weight" for name in modules}
    modules["lm_head"] = model.out_head
    sources["lm_head"] = (
        "lm_head.weight" if "lm_head.weight" in params else "model.embed_tokens.weight"
    )
    if missing := [source for source in sources.values() if source not in params]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"params: missing {', '.join(missing[:5])}{more}, of {len(sources)} tensors"
        )
    plain = {
        name: module.linear if isinstance(module, Linear_LORA) else module
        for name, module in modules.items()
    }
    weights = {
        name: assign(module.weight, params[sources[name]], sources[name])
        for name, module in plain.items()
    }
    for name, module in plain.items():
        module.weight = weights[name]
    for module in modules.values():
        if isinstance(module, Linear_LORA):
            module.unmerge()  # what was merged is of the weights before
    if model.cos.is_meta:
        model.make_tables()
    if left := [
        name for name in params if name not in sources.values() and "rotary_emb" not in name
    ]:
        warnings.warn(
            f"params: {len(left)} tensors have no place in the model, {left[0]!r} for one",
            stacklevel=2,
        )


def _names(layers: int) -> Iterator[str]:
    yield "embed_tokens"
    for index in range(layers):
        yield from (f"layers.{index}.{part}" for part in _LAYER)
    yield "norm"
