"""Initialization for small vision encoders: heads attend to neighboring patches, as a convolution
does.
"""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def local_attention(encoder: nn.Module, strength: float = 4.0, share: float = 0.5) -> None:
    """Initialize a SigLIP encoder so that every head attends in one direction.

    A vision transformer trained from scratch needs many images to learn which patches are
    neighbors. Here the position embeddings are 2-D sines and cosines in the first `share` of the
    channels, and the query and key projections of every head are the rotation that maps a position
    to the one d patches away (Cordonnier et al. 2020; Zheng et al. 2024), with a different d for
    each head. All parameters stay trainable.

    Args:
        encoder: a module with SigLIP's parameter names.
        strength: sharpness of the initial attention.
        share: fraction of the channels that encode the position.
    """
    table = encoder.embeddings.position_embedding.weight
    patches, width = table.shape
    grid = math.isqrt(patches)
    pairs = int(width * share) // 4  # frequencies for each axis
    pairs = min(pairs, 8)
    frequencies = 2 * math.pi / torch.logspace(math.log10(3.0), math.log10(4.0 * grid), pairs)
    where = torch.arange(grid, dtype=torch.float32)
    y, x = where.repeat_interleave(grid), where.repeat(grid)
    waves = []
    for axis in (x, y):
        waves += [torch.cos(axis[:, None] * frequencies), torch.sin(axis[:, None] * frequencies)]
    size = 4 * pairs
    table.normal_(std=0.02)
    table[:, :size] = torch.cat(waves, dim=1) * 0.7
    patch = encoder.embeddings.patch_embedding.weight
    patch.normal_(std=1.0 / math.sqrt(patch[0].numel()))
    patch[:size] *= 0.1  # leave the position's channels mostly to the position
    nn.init.zeros_(encoder.embeddings.patch_embedding.bias)
    offsets = [
        (0, 0),
        (-1, 0),
        (1, 0),
        (0, -1),
        (0, 1),
        (-1, -1),
        (1, 1),
        (-1, 1),
        (1, -1),
        (-2, 0),
        (2, 0),
        (0, -2),
        (0, 2),
    ]
    for number, layer in enumerate(encoder.encoder.layers):
        attention = layer.self_attn
        heads = encoder.config.num_attention_heads
        depth = width // heads
        for projection in (attention.q_proj, attention.k_proj):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        used = min(size, depth)
        # a head of `depth` channels can hold this many frequencies of both axes: the ones that tell
        # neighbors apart best
        keep = torch.arange(pairs)[: max(1, used // 4)]
        for head in range(heads):
            dx, dy = (
                offsets[(head + number * heads) % len(offsets)]
                if number
                else offsets[head % len(offsets)]
            )
            rows = slice(head * depth, (head + 1) * depth)
            query = torch.zeros(depth, width)
            key = torch.zeros(depth, width)
            row = 0
            for axis, shift in ((0, dx), (1, dy)):
                for f in keep.tolist():
                    cos_at, sin_at = axis * 2 * pairs + f, axis * 2 * pairs + pairs + f
                    c, s = (
                        math.cos(float(frequencies[f]) * shift),
                        math.sin(float(frequencies[f]) * shift),
                    )
                    key[row, cos_at] = key[row + 1, sin_at] = 1.0
                    # cos(w(x + d)) = c cos(wx) - s sin(wx), sin(w(x + d)) = s cos(wx) + c sin(wx)
                    query[row, cos_at], query[row, sin_at] = c, -s
                    query[row + 1, cos_at], query[row + 1, sin_at] = s, c
                    row += 2
            scale = math.sqrt(strength * math.sqrt(depth) / max(1, row // 2)) / 0.7
            attention.q_proj.weight[rows] += query * scale
            attention.k_proj.weight[rows] += key * scale
        nn.init.normal_(attention.v_proj.weight, std=1 / math.sqrt(width))
        nn.init.normal_(attention.out_proj.weight, std=0.5 / math.sqrt(width))
        nn.init.normal_(layer.mlp.fc1.weight, std=1 / math.sqrt(width))
        nn.init.normal_(layer.mlp.fc2.weight, std=0.5 / math.sqrt(layer.mlp.fc2.weight.shape[1]))
        for bias in (
            attention.v_proj.bias,
            attention.out_proj.bias,
            layer.mlp.fc1.bias,
            layer.mlp.fc2.bias,
        ):
            nn.init.zeros_(bias)
