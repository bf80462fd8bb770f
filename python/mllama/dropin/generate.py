"""`generate`, and weights under the names of Hugging Face and of older files."""

import inspect
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import mllama
from mllama.dropin.text import Llama3Model

_PARTS = {  # of a block, and what Hugging Face's files call them
    "att.W_query": "self_attn.q_proj",
    "att.W_key": "self_attn.k_proj",
    "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj",
    "ff.fc1": "mlp.gate_proj",
    "ff.fc2": "mlp.up_proj",
    "ff.fc3": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


def assign(left: torch.Tensor, right: Any, tensor_name: str = "unknown") -> nn.Parameter:
    """`right`, a tensor or an array, as a new parameter with left's dtype and device, frozen where
    left is.

    Raises:
        ValueError: the shapes differ.
    """
    right = right.detach() if isinstance(right, torch.Tensor) else torch.tensor(right)
    if left.shape != right.shape:
        found = list(right.shape)
        raise ValueError(f"tensor {tensor_name!r} must be {list(left.shape)}, got {found}")
    device = right.device if left.is_meta else left.device
    trained = left.requires_grad if isinstance(left, nn.Parameter) else True
    return nn.Parameter(right.to(device, left.dtype, copy=True), requires_grad=trained)


def load_weights_into_llama(
    model: Llama3Model, param_config: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """Put a Llama's weights under Hugging Face's names into a model of a dict: all, or none.

    A layer converted to LoRA gets the weight it was made around. Without `lm_head.weight` the head
    gets the embedding matrix. Of param_config, `n_layers` is read.

    Raises:
        TypeError: another model.
        ValueError: another n_layers, missing names, or a tensor of another shape.
    """
    if not isinstance(model, Llama3Model) or model.cfg is None:
        kind = type(model).__name__
        raise TypeError(f"model must be a Llama3Model of a dict, which has a head, got {kind}")
    layers = len(model.trf_blocks)
    if param_config.get("n_layers") != layers:
        raise ValueError(f"n_layers must be {layers}, got {param_config.get('n_layers')}")
    head = "lm_head" if "lm_head.weight" in params else "model.embed_tokens"
    names = {"tok_emb": "model.embed_tokens", "final_norm": "model.norm", "out_head": head}
    for index in range(layers):
        for part, theirs in _PARTS.items():
            names[f"trf_blocks.{index}.{part}"] = f"model.layers.{index}.{theirs}"
    sources = {name: f"{theirs}.weight" for name, theirs in names.items()}
    if missing := [source for source in sources.values() if source not in params]:
        raise ValueError(f"params: missing {len(missing)}: {', '.join(missing[:5])}")
    modules = {name: model.get_submodule(name) for name in names}
    plain = {
        name: module.linear if isinstance(module, mllama.Linear_LORA) else module
        for name, module in modules.items()
    }
    weights = {
        name: assign(module.weight, params[sources[name]], sources[name])
        for name, module in plain.items()
    }
    for name, module in plain.items():
        module.weight = weights[name]
        if module is not modules[name]:
            modules[name].unmerge()  # what was merged belongs to the weights before
    known = set(sources.values())
    if left := [name for name in params if name not in known and "rotary_emb" not in name]:
        warnings.warn(
            f"params: {len(left)} have no place in the model: {left[0]} ...", stacklevel=2
        )


# Names in older weight files, and this package's; the first pattern that matches decides.
_FROM_OLDER = [
    (r"language_model\.model\.tok_emb\.", "language_model.embed_tokens."),
    (r"language_model\.model\.final_norm\.", "language_model.norm."),
    (r"language_model\.lm_head\.", "lm_head."),
    *(
        (rf"language_model\.model\.trf_blocks\.(\d+)\.{older}", rf"language_model.layers.\1.{name}")
        for older, name in (
            (r"att\.W_query\.", "self_attn.q_proj."),
            (r"att\.W_key\.", "self_attn.k_proj."),
            (r"att\.W_value\.", "self_attn.v_proj."),
            (r"att\.out_proj\.", "self_attn.o_proj."),
            (r"norm1\.", "input_layernorm."),
            (r"norm2\.", "post_attention_layernorm."),
            (r"ff\.fc1\.", "mlp.gate_proj."),
            (r"ff\.fc2\.", "mlp.up_proj."),
            (r"ff\.(?:fc3|w_down)\.", "mlp.down_proj."),
            (r"ff\.swiglu\.w_(gate|up)(?:\.weight)?$", r"mlp.\2_proj.weight"),
            (r"ff\.swiglu\.b_(gate|up)(?:\.bias)?$", r"mlp.\2_proj.bias"),
        )
    ),
    *(
        (rf"vision_model\.(?:vision_model\.)?{older}", f"vision_tower.{name}")
        for older, name in (
            (r"embeddings?\.", "embeddings."),
            (r"encoder\.layers\.(\d+)\.layer_?norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
            (r"encoder\.", "encoder."),
            (r"(?:post_)?layernorm\.", "post_layernorm."),
        )
    ),
]
_COMPUTED = re.compile(r"\.(att\.rotary_emb\.inv_freq|embeddings?\.position_ids)$")


def from_older(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an older SigLIP + Llama under this package's names, without computed ones."""
    renamed = {}
    for name, tensor in state_dict.items():
        found = ((re.match(pattern, name), ours) for pattern, ours in _FROM_OLDER)
        match, ours = next(((match, ours) for match, ours in found if match), (None, ""))
        if not _COMPUTED.search(name):
            renamed[name if match is None else match.expand(ours) + name[match.end() :]] = tensor
    return renamed


def text_to_tokens(text: str, tokenizer: Any) -> torch.Tensor:
    """int64 [1, tokens]."""
    return torch.tensor(tokenizer.encode(text), dtype=torch.long)[None]


def token_to_text(token_ids: torch.Tensor, tokenizer: Any) -> str:
    """The text of int [1, tokens] or [tokens]."""
    return tokenizer.decode(token_ids.flatten().tolist())


@torch.no_grad()
def generate(
    model: nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> torch.Tensor:
    """Continue rows of ids; the same tokens with and without a cache.

    Args:
        model: `model(ids)` returns logits [B, T, vocabulary], or a tuple or output that begins with
            them. One that takes `past_kv` and `use_cache` keeps keys and values.
        idx: int [B, T] without padding.
        context_size: the model sees so many of the last tokens; once they move, uncached.
        temperature, top_k: 0 takes the likeliest token; None or 0 samples from all.
        eos_id: ends a row, which is filled with it; the last row's is not added.

    Returns:
        int [B, T + at most max_new_tokens], on the model's device.

    Raises:
        TypeError, ValueError: an argument that cannot be; the text names it.
    """
    own = isinstance(model, Llama3Model)
    if own and model.cfg is None:
        raise ValueError("model has no head: give a Llama3ForCausalLM, or a Llama3Model of a dict")
    _check(idx, max_new_tokens, context_size, temperature, top_k, eos_id)
    idx = idx.to(next((parameter.device for parameter in model.parameters()), idx.device))
    names = inspect.signature(model.forward).parameters.keys()
    use_cache = use_cache and (own or names >= {"past_kv", "use_cache"})
    past_kv, ended = None, torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if use_cache and idx.shape[1] <= context_size:
            new = idx if past_kv is None else idx[:, -1:]
            logits, past_kv = model(new, past_kv=past_kv, use_cache=True)
        else:
            past_kv, output = None, model(idx[:, -context_size:])
            logits = output if isinstance(output, torch.Tensor) else output[0]
        token = _pick(logits[:, -1], temperature, top_k).to(idx.dtype)
        if eos_id is not None:
            token = token.masked_fill(ended, eos_id)
            ended |= token == eos_id
            if ended.all():
                break
        idx = torch.cat([idx, token], 1)
    return idx


def _pick(logits: torch.Tensor, temperature: float, top_k: int | None) -> torch.Tensor:
    """[B, vocabulary] -> ids [B, 1]."""
    if top_k:
        if top_k > logits.shape[-1]:
            raise ValueError(f"top_k must be at most {logits.shape[-1]}, got {top_k}")
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes one infinite
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    return torch.multinomial(logits.softmax(-1), 1)


def _check(idx, max_new_tokens, context_size, temperature, top_k, eos_id) -> None:
    if not isinstance(idx, torch.Tensor) or idx.is_floating_point():
        raise TypeError(f"idx must be an integer torch.Tensor, got {type(idx).__name__}")
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"idx must be [batch, at least 1 token], got {list(idx.shape)}")
    counts = {"max_new_tokens": max_new_tokens, "context_size": context_size, "top_k": top_k or 0}
    counts["eos_id"] = 0 if eos_id is None else eos_id
    for name, value in counts.items():
        if not isinstance(value, int) or value < (name == "context_size"):
            raise ValueError(
                f"{name} must be an integer of at least 0 (context_size: 1), got {value!r}"
            )
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
