"""Rotary positions in the older functions' layout: tables [positions, head_dim] whose two halves
are equal, tensors [B, heads, T, D].

The rotation is the package's, half against half: element i turns with element i + D / 2, which is
what Hugging Face's weights need. The formula on pairs (2i, 2i + 1) that some READMEs print goes
with Meta's own files, whose rows are in another order.
"""

from collections.abc import Mapping

import torch

from mllama.config.checks import check_size
from mllama.dropin._text_config import text_config
from mllama.hf.configs import MllamaTextConfig
from mllama.nn.rope import RotaryEmbedding
from mllama.ops.rope import rope as rotate
from mllama.ops.rope import rope_frequencies, rope_tables


def compute_rope_params(
    head_dim: int,
    theta_base: float = 10000,
    context_length: int = 4096,
    freq_config: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables for the positions 0 to context_length - 1.

    Args:
        head_dim: size of a head, even.
        theta_base: base of the frequencies.
        context_length: positions.
        freq_config: Llama 3's frequency scaling: factor, low_freq_factor, high_freq_factor,
            original_context_length; None scales nothing.
        dtype: of the tables; the angles are float32.

    Returns:
        (cos, sin), each [context_length, head_dim].

    Raises:
        ValueError: an odd head_dim, no position, a missing or impossible number.
    """
    check_size("compute_rope_params", "context_length", context_length)
    scaling = None
    if freq_config is not None:
        scaling = {"rope_type": "llama3"} | dict(freq_config)
        if "original_context_length" in scaling:
            scaling["original_max_position_embeddings"] = scaling.pop("original_context_length")
    tables = rope_tables(
        torch.arange(context_length)[None], rope_frequencies(head_dim, theta_base, scaling)
    )
    return tuple(torch.cat([table[0], table[0]], -1).to(dtype) for table in tables)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x, [B, heads, T, head_dim], to the first T positions of tables from
    `compute_rope_params`; in x's dtype.

    Raises:
        ValueError: an odd head_dim, tables of another size or with fewer than T positions.
        TypeError: a tensor that is not floating.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 4:
        raise ValueError(
            f"rope: x must be a tensor [batch, heads, tokens, head_dim], got {getattr(x, 'shape', type(x).__name__)}"
        )
    x = x.transpose(1, 2)
    rotated, _ = rotate(x, x[:, :, :0], *half_tables(cos, sin, x.shape[1], x.shape[3]))
    return rotated.transpose(1, 2)


def half_tables(
    cos: torch.Tensor, sin: torch.Tensor, tokens: int, head_dim: int, past: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The package's tables, float32 [B or 1, tokens, head_dim / 2], of a script's.

    Args:
        cos, sin: [positions, head_dim], of which rows `past` to `past + tokens` are taken, or all
            where there are only so many as tokens; or [B or 1, tokens, head_dim].
        tokens: how many are rotated.
        head_dim: size of a head.
        past: position of the first.
    """
    if head_dim % 2:
        raise ValueError(f"rope: head_dim must be even, got {head_dim}")
    halves = []
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, torch.Tensor) or not table.is_floating_point():
            raise TypeError(
                f"rope: {name} must be a floating torch.Tensor, got {getattr(table, 'dtype', type(table).__name__)}"
            )
        rows = table
        if table.dim() == 2:
            rows = table[past : past + tokens][None] if len(table) >= past + tokens else table[None]
        if rows.dim() != 3 or rows.shape[1:] != (tokens, head_dim):
            wanted = (
                f"[at least {past + tokens} positions, {head_dim}] or [batch, {tokens}, {head_dim}]"
            )
            raise ValueError(f"rope: {name} must be {wanted}, got {list(table.shape)}")
        half, other = rows.detach().float().chunk(2, -1)
        if not torch.equal(half, other):
            raise ValueError(
                f"rope: the two halves of {name}'s rows must be equal, as compute_rope_params makes them"
            )
        halves.append(half.contiguous())
    return halves[0], halves[1]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1), the halves of the last axis."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, [B, heads, T, head_dim] each, by tables [B or 1, T, head_dim];
    `unsqueeze_dim` is the heads' axis, 1 or 2.
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(
            f"apply_rotary_pos_emb: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim!r}"
        )
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = rotate(q, k, *half_tables(cos, sin, q.shape[1], q.shape[-1]))
    return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


class LLAMARotaryEmbedding(RotaryEmbedding):
    """The package's rotary frequencies of a config, its scaling included, with the older call."""

    def __init__(
        self, config: MllamaTextConfig | Mapping, device: torch.device | str | None = None
    ):
        config = text_config(config)
        super().__init__(config.head_dim, config.rope_parameters)
        self.frequencies = self.frequencies.to(device)
        self.dim = config.head_dim
        self.base = config.rope_base
        self.max_position_embeddings = config.max_position_embeddings

    @property
    def inv_freq(self) -> torch.Tensor:
        """float32 [head_dim / 2]."""
        return self.frequencies

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, seq_len: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: [B, T], whole numbers -> cos and sin, [B, T, head_dim] in x's dtype.
        `seq_len` is not used.
        """
        return tuple(
            torch.cat([table, table], -1).to(x.dtype) for table in self.tables(position_ids)
        )

    def tables(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The package's: float32 [B, T, head_dim / 2]."""
        return super().forward(whole(position_ids))


def whole(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Positions counted from a float mask are floats."""
    floating = isinstance(position_ids, torch.Tensor) and position_ids.is_floating_point()
    return position_ids.long() if floating else position_ids
