"""The part of a prompt that a cache already has: the longest common prefix of ids and images."""

from typing import NamedTuple

import torch

from mllama.config.spec import ModelSpec


class Prompt(NamedTuple):
    """One row's prompt.

    Attributes:
        ids: its ids, without prepended visual tokens and padding.
        images: keys of its images, in order; equal keys are equal images.
        cross_mask: its cross_attention_mask, [1, ids or fewer, images, tiles], whose last row
            holds for the ids after it; or None.
    """

    ids: list[int]
    images: list[bytes]
    cross_mask: torch.Tensor | None = None


class Reuse(NamedTuple):
    """The part of a prompt that is reused from the cache.

    Attributes:
        length: number of leading ids that are not computed again.
        images: number of leading images whose positions are not computed again.
    """

    length: int = 0
    images: int = 0


def find_reuse(
    spec: ModelSpec,
    cached: Prompt,
    prompt: Prompt,
    num_prefix_tokens: int = 0,
    reference: str = "meta",
) -> Reuse:
    """How much of a prompt can be reused. The last id is always computed, for its logits.

    Args:
        spec: the model's spec.
        cached: what is in the cache.
        prompt: what is to be.
        num_prefix_tokens: visual tokens in the cache before the text.
        reference: the model's, of Llama-3.2-Vision.
    """
    if spec.bidirectional_prefix:  # the start of a prompt attends to its end
        return Reuse()
    length = common(cached.ids, prompt.ids[:-1])
    count, token = len(prompt.images), spec.image_token_index
    if spec.text.cross_attention_layers:
        same = _sees_the_same(cached, prompt, length, reference)
        return Reuse(length, common(cached.images, prompt.images)) if same else Reuse()
    places = [i for i, one in enumerate(prompt.ids) if one == token]
    if num_prefix_tokens:
        same = cached.images == prompt.images and not places
        return Reuse(length, count) if same else Reuse()
    if not cached.images and not prompt.images:
        return Reuse(length)
    if token is None or len(places) != count * spec.tokens_per_image:
        return Reuse()  # the model finds the places, or says that there are none
    covered = sum(place < length for place in places)
    whole = min(covered // spec.tokens_per_image, common(cached.images, prompt.images))
    if covered > whole * spec.tokens_per_image:  # an image is reused whole or not at all
        length = places[whole * spec.tokens_per_image]
    return Reuse(length, whole)


def common(first: list, second: list) -> int:
    """Length of the longest common prefix."""
    pairs = zip(first, second, strict=False)
    different = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(different, min(len(first), len(second)))


def _sees_the_same(cached: Prompt, prompt: Prompt, length: int, reference: str) -> bool:
    """Whether the first positions attend to the same images, through cross-attention layers, as
    they did. There may be further images that they do not see.
    """
    before, now, known = cached.cross_mask, prompt.cross_mask, len(cached.images)
    if prompt.images[:known] != cached.images:
        return False
    more = len(prompt.images) > known
    if now is None or (before is None and known):  # without a mask everything is seen
        return before is now and not more
    rows = torch.arange(length, device=now.device)
    visible = _rows(now, rows)  # (length, images, tiles)
    old = visible.new_zeros(length, 0, visible.shape[2]) if before is None else _rows(before, rows)
    if not torch.equal(visible[:, :known], old) or visible[:, known:].any():
        return False
    # With "hf", a position without a visible image attends to all of them.
    return not more or reference == "meta" or bool(old.flatten(1).any(1).all())


def _rows(mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a cross_attention_mask, the last one repeated: bool [rows, images, tiles]."""
    return mask[0, rows.clamp(max=mask.shape[1] - 1)] != 0
