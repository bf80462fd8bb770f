"""Which image keys each text position attends to.

Visibility is per tile and changes only at image placeholders. Positions between two changes share
one call of the attention operator, so that a [T, S] mask is never made.
"""

from dataclasses import dataclass, replace

import torch

from mllama.config.checks import check_reference


@dataclass(frozen=True)
class Segment:
    """Text positions `start` to `end` (exclusive), whose rows see the same keys throughout.

    Attributes:
        start, end: the positions.
        key_mask: bool [B, S], the keys that each row sees; None where all rows see all.
        blind: no row sees anything.
    """

    start: int
    end: int
    key_mask: torch.Tensor | None = None
    blind: bool = False


@dataclass(frozen=True)
class CrossAttentionContext:
    """What the cross-attention layers of one forward pass share.

    Attributes:
        states: features of the images that are new in this pass, [B, keys, hidden], or None.
        tile_mask: bool [images * tiles], of all images so far: which tiles have keys. On the
            CPU.
        segments: the text's positions, in order; None is one segment that sees all keys.
        visible: bool [B, T, 1], False where a position sees no image; None where all see one.
    """

    states: torch.Tensor | None
    tile_mask: torch.Tensor
    segments: tuple[Segment, ...] | None = None
    visible: torch.Tensor | None = None

    def to(self, device: torch.device | str | int) -> "CrossAttentionContext":
        """The same on another device; accelerate calls it where layers are spread over several."""
        states, visible = (
            None if tensor is None else tensor.to(device) for tensor in (self.states, self.visible)
        )
        segments = self.segments and tuple(
            segment
            if segment.key_mask is None
            else replace(segment, key_mask=segment.key_mask.to(device))
            for segment in self.segments
        )
        return replace(self, states=states, segments=segments, visible=visible)


def cross_context(
    states: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens_per_tile: int,
    reference: str = "meta",
    *,
    cached: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
) -> CrossAttentionContext | None:
    """Prepare one forward pass.

    Args:
        states: projected features of new images, [B, images * tiles * tokens_per_tile, hidden],
            or None.
        mask: [B, T, images, tiles] of any dtype, non-zero where a position sees a tile, over
            cached images and new ones; None lets every position see all.
        tokens_per_tile: keys of one tile.
        reference: what a position that sees no image does. "meta": the layer leaves it as it is.
            "hf", as transformers: it attends to every key, padding too, and only the feed-forward
            half leaves it.
        cached: `tile_mask` of the pass before, where its keys are in the cache.
        filled: [B, images, tiles] of any dtype, zero where a tile of a new image is empty. With
            "meta" and a mask, tiles that are empty in every row, and visible to no position, get no
            keys: nothing would attend to them.

    Returns:
        The context, or None where there is no image: layers given None do nothing.

    Raises:
        TypeError: mask is no tensor.
        ValueError: mask or filled do not fit the keys, mask shows a tile that got none, or a
            reference that is not known.
    """
    check_reference(reference)
    cached = torch.ones(0, dtype=torch.bool, device="cpu") if cached is None else cached
    new = torch.ones(
        0 if states is None else states.shape[1] // tokens_per_tile, dtype=torch.bool, device="cpu"
    )
    columns = len(cached) + len(new)
    if not columns:
        return None
    if mask is None:
        return CrossAttentionContext(states, torch.cat([cached, new]))
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"cross_attention_mask must be a torch.Tensor or None, got {type(mask).__name__}"
        )
    if mask.dim() != 4 or mask.shape[2] * mask.shape[3] != columns:
        raise ValueError(
            f"cross_attention_mask must be [batch, tokens, images, tiles] for {columns} tiles, "
            f"got {list(mask.shape)}"
        )
    visible_tiles = (mask != 0).flatten(2)
    host = visible_tiles.cpu()
    shown = host.flatten(0, 1).any(0)
    if reference == "meta" and states is not None and filled is not None:
        new = _used(filled, new) | shown[len(cached) :]
        if not new.all():
            states = states.unflatten(1, (len(new), tokens_per_tile))  # (B, tiles, keys, hidden)
            states = states[:, new].flatten(1, 2)
    tile_mask = torch.cat([cached, new])
    if (shown & ~tile_mask).any():
        raise ValueError(
            "cross_attention_mask must not show tiles that were empty when their image was given"
        )
    if not tile_mask.all():
        visible_tiles, host = visible_tiles[..., tile_mask], host[..., tile_mask]
    visible = None if host.any(-1).all() else visible_tiles.any(-1, keepdim=True)
    if reference == "hf" and visible is not None:
        visible_tiles, host = visible_tiles | ~visible, host | ~host.any(-1, keepdim=True)
    return CrossAttentionContext(
        states, tile_mask, _segments(visible_tiles, host, tokens_per_tile), visible
    )


def _used(filled: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """bool [images * tiles]: tiles that are filled in some row; all of them where none is, so
    that an image always has keys.
    """
    used = (filled != 0).flatten(1).any(0).cpu()
    if used.shape != new.shape:
        raise ValueError(
            f"aspect_ratio_mask must be [batch, images, tiles] for {len(new)} tiles, "
            f"got {list(filled.shape)}"
        )
    return used if used.any() else new


def _segments(
    visible_tiles: torch.Tensor, host: torch.Tensor, tokens_per_tile: int
) -> tuple[Segment, ...]:
    """bool [B, T, tiles], and the same on the CPU -> runs of positions with equal visibility."""
    changes = (host[:, 1:] != host[:, :-1]).any(-1).any(0).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), host.shape[1]]
    segments = []
    for start, end in zip(edges, edges[1:], strict=False):
        rows = host[:, start]
        key_mask = (
            None if rows.all() else visible_tiles[:, start].repeat_interleave(tokens_per_tile, -1)
        )
        segments.append(Segment(start, end, key_mask, blind=not rows.any()))
    return tuple(segments)
