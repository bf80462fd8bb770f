"""`generate`, and weights under the names of Hugging Face and of older files."""

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mllama.dropin.text import Llama3Model
from mllama.weights.rows import Drop, Rename, plan_moves

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


_HF_NAMES = (  # of a Llama, and those of a decoder of a dict
    Drop("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Rename("tok_emb.weight", "model.embed_tokens.weight"),
    Rename("final_norm.weight", "model.norm.weight"),
    Rename("out_head.weight", "lm_head.weight"),
    *(
        Rename(f"trf_blocks.{{}}.{older}.weight", f"model.layers.{{}}.{theirs}.weight")
        for older, theirs in _PARTS.items()
    ),
)


def load_weights_into_llama(
    model: Llama3Model, param_config: Mapping[str, Any], params: Mapping[str, Any]
) -> None:
    """Put a Llama's weights under Hugging Face's names into a model of a dict: all, or none.

    Without `lm_head.weight` the head gets the embedding matrix. Of param_config, `n_layers` is
    read. A model that was converted to LoRA has other names, so that weights are missing.

    Raises:
        TypeError: another model.
        ValueError: another n_layers, missing weights, or one of another shape.
    """
    if not isinstance(model, Llama3Model) or model.cfg is None:
        kind = type(model).__name__
        raise TypeError(f"model must be a Llama3Model of a dict, which has a head, got {kind}")
    layers = len(model.trf_blocks)
    if param_config.get("n_layers") != layers:
        raise ValueError(f"n_layers must be {layers}, got {param_config.get('n_layers')}")
    moves, unknown, _ = plan_moves(_HF_NAMES, params)
    sources = {move.ours[0]: move.theirs[0] for move in moves}
    sources.setdefault("out_head.weight", "model.embed_tokens.weight")
    own = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in own if sources.get(name) not in params]
    if missing:
        raise ValueError(f"params: no weights for {', '.join(missing[:5])}")
    weights = {name: assign(own[name], params[sources[name]], sources[name]) for name in own}
    for name, weight in weights.items():
        model.get_submodule(name.removesuffix(".weight")).weight = weight
    if unused := unknown + [source for name, source in sources.items() if name not in own]:
        warnings.warn(f"params: {len(unused)} do not fit: {', '.join(unused[:5])}", stacklevel=2)


_DECODER, _TOWER = "language_model.model", "vision_model.vision_model"
_OLDER_NAMES = (  # of weight files, and this package's; the first row that knows a name decides
    Drop(f"{_DECODER}.trf_blocks.{{}}.att.rotary_emb.inv_freq"),
    Drop("vision_model.*.position_ids"),
    Rename("language_model.embed_tokens.*", f"{_DECODER}.tok_emb.*"),
    Rename("language_model.norm.*", f"{_DECODER}.final_norm.*"),
    Rename("lm_head.*", "language_model.lm_head.*"),
    *(
        Rename(f"language_model.layers.{{}}.{ours}.*", f"{_DECODER}.trf_blocks.{{}}.{older}.*")
        for older, ours in _PARTS.items()
    ),
    *(
        Rename(
            f"vision_tower.{ours}.*",
            f"{_TOWER}.{older}.*",
            also=[
                f"{tower}.{name}.*" for tower in (_TOWER, "vision_model") for name in (older, ours)
            ],
        )
        for older, ours in (
            ("embedding", "embeddings"),
            ("encoder.layers.{}.layernorm1", "encoder.layers.{}.layer_norm1"),
            ("encoder.layers.{}.layernorm2", "encoder.layers.{}.layer_norm2"),
            ("encoder", "encoder"),
            ("layernorm", "post_layernorm"),
        )
    ),
)


def from_older(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an older SigLIP + Llama under this package's names, without computed ones.

    Raises:
        ValueError: two names of one tensor.
    """
    moves, unknown, twice = plan_moves(_OLDER_NAMES, state_dict)
    if twice:
        raise ValueError(f"state_dict has one tensor under two names: {', '.join(twice)}")
    renamed = {move.ours[0]: state_dict[move.theirs[0]] for move in moves}
    return renamed | {name: state_dict[name] for name in unknown}


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
    if not isinstance(idx, torch.Tensor) or idx.is_floating_point():
        raise TypeError(f"idx must be an integer torch.Tensor, got {type(idx).__name__}")
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"idx must be [batch, at least 1 token], got {list(idx.shape)}")
    _check_number("max_new_tokens", max_new_tokens)
    _check_number("context_size", context_size, least=1)
    _check_number("top_k", top_k or 0)
    _check_number("eos_id", 0 if eos_id is None else eos_id)
    _check_number("temperature", temperature, kind=(int, float))
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


def _check_number(name: str, value: Any, least: int = 0, kind: Any = int) -> None:
    if not isinstance(value, kind) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")


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
