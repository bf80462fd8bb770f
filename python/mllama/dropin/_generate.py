"""Token by token: the older `generate`, and its two helpers for a tokenizer."""

import inspect
from typing import Any, Protocol

import torch
from torch import nn

from mllama.config.checks import check_size
from mllama.dropin._text import Llama3Model


class _Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def text_to_tokens(text: str, tokenizer: _Tokenizer) -> torch.Tensor:
    """int64 [1, tokens]."""
    return torch.tensor(tokenizer.encode(text), dtype=torch.long)[None]


def token_to_text(token_ids: torch.Tensor, tokenizer: _Tokenizer) -> str:
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
    """Continue rows of ids.

    A row is read through a window of its last `context_size` tokens. While it fits, keys and values
    are kept between steps; once the window moves, every step reads it anew, since positions and all
    that was computed from what left it are others. So the tokens are the same with and without
    `use_cache`.

    Args:
        model: called as `model(ids)` for logits [B, T, vocabulary], or for a tuple or a model
            output that begins with them. With `past_kv` and `use_cache` among its arguments it also
            keeps keys and values.
        idx: int [B, T], without padding.
        max_new_tokens: at most so many are added.
        context_size: tokens that the model is shown.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is
            drawn with torch's generator.
        top_k: draw from so many likeliest tokens; None or 0 is all.
        eos_id: a row ends with it, and is filled with it while others go on. Where all rows have
            ended the last one's is not added.
        use_cache: keep keys and values where the model does.

    Returns:
        int [B, T + at most max_new_tokens], on the model's device.

    Raises:
        TypeError, ValueError: an argument that cannot be, by its name; top_k beyond the vocabulary
            for one.
    """
    if isinstance(model, Llama3Model) and model.from_config:
        raise ValueError(
            "generate: model must answer logits; a Llama3Model of a LLAMA32Config has no head: give its Llama3ForCausalLM"
        )
    _check(idx, max_new_tokens, context_size, temperature, top_k, eos_id)
    idx = idx.to(next((parameter.device for parameter in model.parameters()), idx.device))
    use_cache = (
        use_cache and {"past_kv", "use_cache"} <= inspect.signature(model.forward).parameters.keys()
    )
    past_kv, ended = None, torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if use_cache and idx.shape[1] <= context_size:
            logits, past_kv = model(
                idx if past_kv is None else idx[:, -1:], past_kv=past_kv, use_cache=True
            )
        else:
            past_kv, answer = None, model(idx[:, -context_size:])
            logits = answer if isinstance(answer, torch.Tensor) else answer[0]
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
            raise ValueError(
                f"top_k must be at most the vocabulary's {logits.shape[-1]} tokens, got {top_k}"
            )
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    # The largest becomes 0: no temperature makes it infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(
        temperature, torch.finfo(logits.dtype).tiny
    )
    return torch.multinomial(logits.softmax(-1), 1)


def _check(
    idx: torch.Tensor,
    max_new_tokens: int,
    context_size: int,
    temperature: float,
    top_k: Any,
    eos_id: Any,
) -> None:
    if not isinstance(idx, torch.Tensor) or idx.is_floating_point():
        raise TypeError(
            f"idx must be an integer torch.Tensor, got {getattr(idx, 'dtype', type(idx).__name__)}"
        )
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(
            f"idx must be [batch, tokens] with at least one token, got {list(idx.shape)}"
        )
    check_size("generate", "max_new_tokens", max_new_tokens, minimum=0)
    check_size("generate", "context_size", context_size)
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, (int, float))
        or not 0 <= temperature < float("inf")
    ):
        raise ValueError(
            f"generate: temperature must be a number of at least 0, got {temperature!r}"
        )
    for name, value in (("top_k", top_k), ("eos_id", eos_id)):
        if value is not None:
            check_size("generate", name, value, minimum=0)
