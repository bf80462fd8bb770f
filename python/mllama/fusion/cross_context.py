"""Which image keys each text position attends to.

Visibility is per tile and changes only at image placeholders. Positions between two changes share
one call of the attention operator, so a [T, S] mask is never materialized.
"""

from dataclasses import dataclass, replace

import torch

from mllama.config.checks import check_reference


@dataclass(frozen=True)
class Segment:
    """Text positions `start` to `end` (exclusive) with the same visible keys.

    Attributes:
        start, end: the positions.
        key_mask: bool [B, S], the keys visible to each row; None if all rows see all keys.
        blind: no key is visible to any row.
    """

    start: int
    end: int
    key_mask: torch.Tensor | None = None
    blind: bool = False


@dataclass(frozen=True)
class CrossAttentionContext:
    """Shared by the cross-attention layers of one forward pass.

    Attributes:
        states: features of the new images, [B, keys, hidden], or None.
        tile_mask: bool [images * tiles] on the CPU, the tiles of all images so far that have keys.
        segments: the text's positions, in order; None is one segment with all keys visible.
        visible: bool [B, T, 1], False where no image is visible; None if all positions see one.
    """

    states: torch.Tensor | None
    tile_mask: torch.Tensor
    segments: tuple[Segment, ...] | None = None
    visible: torch.Tensor | None = None

    def to(self, device: torch.device | str | int) -> "CrossAttentionContext":
        """Copy to a device; accelerate calls it for models spread over several devices."""
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
    aspect_ratio_mask: torch.Tensor | None = None,
) -> CrossAttentionContext | None:
    """Build the context of one forward pass.

    Args:
        states: projected features of new images, [B, images * tiles * tokens_per_tile, hidden],
            or None.
        mask: [B, T, images, tiles] of any dtype, non-zero where a tile is visible, for cached
            and new images. Default: all tiles are visible.
        tokens_per_tile: keys per tile.
        reference: behavior of a position without visible images. "meta": the layer returns its
            input. "hf", as transformers: it attends to every key, padding included, and only the
            feed-forward half is skipped.
        cached: `tile_mask` of the previous pass, whose keys are in the cache.
        aspect_ratio_mask: [B, images, tiles] of any dtype, zero where a tile of a new image is
            empty. With "meta" and a mask, tiles that are empty in every row and visible to no
            position get no keys.

    Returns:
        The context, or None without images: the layers then return their input.

    Raises:
        TypeError: mask is not a tensor.
        ValueError: mask or aspect_ratio_mask do not fit the keys, mask shows a tile without keys,
            or the reference is unknown.
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
    if reference == "meta" and states is not None and aspect_ratio_mask is not None:
        new = _used(aspect_ratio_mask, new) | shown[len(cached) :]
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


def _used(aspect_ratio_mask: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """bool [images * tiles]: tiles that are non-empty in some row; all tiles if none is, so that an
    image always has keys.
    """
    used = (aspect_ratio_mask != 0).flatten(1).any(0).cpu()
    if used.shape != new.shape:
        raise ValueError(
            f"aspect_ratio_mask must be [batch, images, tiles] for {len(new)} tiles, "
            f"got {list(aspect_ratio_mask.shape)}"
        )
    return used if used.any() else new


def _segments(
    visible_tiles: torch.Tensor, host: torch.Tensor, tokens_per_tile: int
) -> tuple[Segment, ...]:
    """bool [B, T, tiles], and its copy on the CPU -> runs of positions with equal visibility."""
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
