"""Parts of the older decoder: KV cache, rotary tables, masks, norm, fused feed-forward blocks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import linear, pad

from mllama import ops
from mllama.dropin.config import rope_scaling, text_config
from mllama.hf.names import Cache, DynamicCache, PretrainedConfig

KeyValue = tuple[torch.Tensor, torch.Tensor]
_HIDDEN = -1e4  # a score this much lower leaves no probability, in float16 too


@contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Make parameters in this dtype; None leaves torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class KVCache(DynamicCache):
    """A transformers cache with the older names: `num_items()`, `key_cache`, `value_cache`."""

    def num_items(self) -> int:
        """Number of cached tokens."""
        return self.get_seq_length()

    @property
    def key_cache(self) -> list[torch.Tensor]:
        """Keys of each layer, [B, KV, tokens, D]."""
        return [layer.keys for layer in self.layers if layer.is_initialized]

    @property
    def value_cache(self) -> list[torch.Tensor]:
        """Values of each layer, as the keys."""
        return [layer.values for layer in self.layers if layer.is_initialized]


def num_cached(kv_cache: Cache | None, layer_idx: int = 0) -> int:
    """Tokens that a layer has in a cache; TypeError for what is none."""
    if kv_cache is not None and not isinstance(kv_cache, Cache):
        raise TypeError(f"kv_cache must be a KVCache or None, got {type(kv_cache).__name__}")
    return 0 if kv_cache is None else int(kv_cache.get_seq_length(layer_idx))


def compute_rope_params(
    head_dim: int,
    theta_base: float = 10000,
    context_length: int = 4096,
    freq_config: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> KeyValue:
    """(cos, sin) of positions 0 to context_length - 1, each [context_length, head_dim].

    The two halves of a row are equal. `freq_config` is Llama 3's frequency scaling. Angles are
    float32 whatever the dtype of the tables.

    Raises:
        ValueError: an odd head_dim, no position, a number of freq_config that is missing.
    """
    if not isinstance(context_length, int) or context_length < 1:
        raise ValueError(f"context_length must be an integer of at least 1, got {context_length!r}")
    frequencies = ops.rope_frequencies(head_dim, theta_base, rope_scaling(freq_config))
    tables = ops.rope_tables(torch.arange(context_length)[None], frequencies)
    cos, sin = (torch.cat([table[0], table[0]], -1).to(dtype) for table in tables)
    return cos, sin


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, heads, T, D] to the first T positions of the tables; element i with i + D/2.

    Raises:
        ValueError: an odd D, or tables of another size.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [batch, heads, tokens, head_dim], got {list(x.shape)}")
    x = x.transpose(1, 2)  # (B, T, heads, D)
    rotated, _ = ops.rope(x, x[:, :, :0], *half_tables(cos, sin, x.shape[1], x.shape[3]))
    return rotated.transpose(1, 2)


def half_tables(cos, sin, tokens: int, head_dim: int, past: int = 0) -> list[torch.Tensor]:
    """The operator's tables, float32 [1 or B, tokens, D/2], of [positions, D] or [B, tokens, D].

    Positions past to past + tokens are taken, or all rows where there are as many as tokens.
    """
    halves = []
    for name, table in (("cos", cos), ("sin", sin)):
        rows = table
        if table.dim() == 2:
            rows = table[past : past + tokens] if len(table) >= past + tokens else table
            rows = rows[None]
        if head_dim % 2 or rows.shape[1:] != (tokens, head_dim):
            wanted = f"[at least {past + tokens}, {head_dim}], head_dim even"
            raise ValueError(f"{name} must be {wanted}, got {list(table.shape)}")
        half, other = rows.detach().float().chunk(2, -1)  # (1 or B, T, D/2) each
        if not torch.equal(half, other):
            raise ValueError(f"{name}: the two halves of a row must be equal")
        halves.append(half.contiguous())
    return halves


class LLAMARotaryEmbedding(nn.Module):
    """Rotary tables of a config, its frequency scaling included; `inv_freq` is float32 [D/2]."""

    def __init__(self, config: Mapping | PretrainedConfig):
        super().__init__()
        config = text_config(config)
        self.dim, scaling = config.head_dim, dict(config.rope_parameters)
        self.inv_freq = ops.rope_frequencies(self.dim, scaling=scaling, device="cpu")  # no buffer

    def tables(self, position_ids: torch.Tensor) -> KeyValue:
        """The operator's: float32 [B, T, D/2]."""
        return ops.rope_tables(position_ids.long(), self.inv_freq.to(position_ids.device))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> KeyValue:
        """(cos, sin) of positions [B, T], each [B, T, D] in x's dtype."""
        cos, sin = (torch.cat([half, half], -1).to(x.dtype) for half in self.tables(position_ids))
        return cos, sin


def visible_keys(mask: torch.Tensor | None, tokens: int, past: int) -> torch.Tensor | None:
    """What a block's mask, [T, S] to [B, heads, T, S], lets a query see: bool, True where visible,
    or float32 to add to the scores. None is causality, which the operator has.

    The mask is True or 1 where a key is hidden, or floats to add. S may leave out the past.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
    rows, keys = mask.shape[-2:] if mask.dim() in (2, 3, 4) else (0, 0)
    if rows not in (1, tokens) or keys not in (tokens, past + tokens):
        raise ValueError(f"mask must be [{tokens}, {past + tokens}], got {list(mask.shape)}")
    mask = mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    mask = pad(mask, (past + tokens - keys, 0))
    if mask.dtype != torch.bool and bool(((mask == 0) | (mask == 1)).all()):
        mask = mask == 1
        if mask.all(-1).any():  # the opposite convention hides all keys of the first query
            raise ValueError("mask hides every key of a query: True, or 1, is where one is hidden")
    if mask.dtype == torch.bool:
        return _unless_causal(~mask, tokens)
    if not mask.is_floating_point():
        raise ValueError(f"mask must be bool, True where a key is hidden, got {mask.dtype}")
    return _unless_causal(_added(mask), tokens)


def _added(mask: torch.Tensor) -> torch.Tensor:
    """Numbers to add to the scores: as bool, True where visible, unless some are in between."""
    if not bool((mask <= 0).all()):
        raise ValueError("a mask to add to the scores must be 0 where a key is visible, else below")
    visible = mask == 0
    return visible if bool((visible | (mask <= _HIDDEN)).all()) else mask.float()


def _causal(tokens: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)


def _unless_causal(visible: torch.Tensor, tokens: int) -> torch.Tensor | None:
    if visible.dtype != torch.bool:
        return visible
    causal = _causal(tokens, visible.shape[-1], visible.device)
    return None if bool((visible == causal).all()) else visible


def split_mask(mask: torch.Tensor | None, batch: int, tokens: int, keys: int):
    """An attention_mask as (key_mask bool [B, keys], visible): at most one of them is not None."""
    if mask is None:
        return None, None
    if mask.dim() == 2:
        if mask.shape != (batch, keys):
            raise ValueError(f"attention_mask must be [{batch}, {keys}], got {list(mask.shape)}")
        return mask != 0, None
    if not mask.is_floating_point():
        raise TypeError(f"a 4-D attention_mask is added to the scores, so no {mask.dtype}")
    if mask.dim() != 4 or mask.shape[2] not in (1, tokens) or mask.shape[3] < keys:
        wanted = f"[batch, heads, {tokens}, at least {keys}]"
        raise ValueError(f"attention_mask must be {wanted}, got {list(mask.shape)}")
    visible, causal = _added(mask[..., :keys]), _causal(tokens, keys, mask.device)
    if visible.dtype == torch.bool:
        return None, _unless_causal(visible & causal, tokens)
    return None, visible.masked_fill(~causal, -torch.inf)


class RMSNorm(nn.Module):
    """Llama's root-mean-square norm, of x or of x + residual; also `FusedRMSNorm`."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., dim] -> the same shape and dtype."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.add_rms_norm(x.to(residual.dtype), residual, self.weight, self.eps)[0]


class FusedSwiGLU(nn.Module):
    """silu(x w_gate' + b_gate) * (x w_up' + b_up); b_gate and b_up are None without bias."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        gate, up = (nn.Linear(hidden_size, intermediate_size, bias) for _ in range(2))
        self.w_gate, self.w_up, self.b_gate, self.b_up = gate.weight, up.weight, gate.bias, up.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., intermediate_size]."""
        return ops.swiglu(linear(x, self.w_gate, self.b_gate), linear(x, self.w_up, self.b_up))


class FusedFeedForward(nn.Module):
    """w_down(swiglu(x)); `bias` is for all three projections."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.swiglu = FusedSwiGLU(hidden_size, intermediate_size, bias)
        self.w_down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape."""
        return self.w_down(self.swiglu(x))


_PROJECTIONS = (("w1", "w3", "w2"), ("fc1", "fc2", "fc3"), ("gate_proj", "up_proj", "down_proj"))


def convert_feedforward_to_fused(feedforward_module: nn.Module) -> FusedFeedForward:
    """A `FusedFeedForward` with copies of the weights of linear layers w1, w3, w2 (gate, up, down);
    fc1, fc2, fc3; or gate_proj, up_proj, down_proj.

    Raises:
        TypeError: a module without such layers.
    """
    found = ([getattr(feedforward_module, name, None) for name in names] for names in _PROJECTIONS)
    layers = next((three for three in found if all(isinstance(x, nn.Linear) for x in three)), None)
    if layers is None:
        kind = type(feedforward_module).__name__
        raise TypeError(f"feedforward_module must have linear layers {_PROJECTIONS}, got {kind}")
    gate, up, down = layers
    fused = FusedFeedForward(gate.in_features, gate.out_features, gate.bias is not None)
    fused = fused.to(gate.weight.device, gate.weight.dtype)
    copies = {"swiglu.w_gate": gate.weight, "swiglu.w_up": up.weight, "w_down.weight": down.weight}
    if gate.bias is not None:
        copies |= {"swiglu.b_gate": gate.bias, "swiglu.b_up": up.bias, "w_down.bias": down.bias}
    fused.load_state_dict(copies)
    return fused
