"""rope on Llama-3.2-1B's queries and keys."""

from collections.abc import Iterator

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import rope, rope_frequencies, rope_tables

PEER = "transformers' apply_rotary_pos_emb"


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction. Both sides get queries and keys in the projections'
    layout, [B, T, heads, D].
    """
    for length in shapes.TEXT_LENGTHS:
        for dtype in DTYPES:
            q = torch.randn(1, length, shapes.HEADS, shapes.HEAD_SIZE, dtype=dtype)
            k = torch.randn(1, length, shapes.KV_HEADS, shapes.HEAD_SIZE, dtype=dtype)
            tables = rope_tables(
                torch.arange(length)[None], rope_frequencies(shapes.HEAD_SIZE, 500000.0)
            )
            peer_tables = tuple(torch.cat((table, table), dim=-1).to(dtype) for table in tables)
            size = (q.numel() + k.numel()) * q.element_size()
            yield from both_directions(
                f"{shapes.label(q.shape)} + {shapes.KV_HEADS}",
                rope,
                _peer,
                (q, k, *tables),
                peer_inputs=(q, k, *peer_tables),
                differentiable=2,
                forward_bytes=2 * size,
                backward_bytes=2 * size,
            )


def _peer(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
