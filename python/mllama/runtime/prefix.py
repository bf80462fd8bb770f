"""The part of a prompt that a cache already has: the longest common prefix of ids and images."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from mllama.config.spec import ModelSpec
from mllama.nn.kv_cache import KVCache


class Reuse(NamedTuple):
    """The part of a prompt that is reused from the cache.

    Attributes:
        length: number of leading ids that are not computed again.
        images: number of leading images that are not encoded again.
    """

    length: int = 0
    images: int = 0


def same_images(
    first: Mapping[str, torch.Tensor] | None, second: Mapping[str, torch.Tensor] | None
) -> bool:
    """Whether the image tensors of two prompts, by name, are equal."""
    if not first or not second:
        return not first and not second
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def find_reuse(
    spec: ModelSpec,
    cache: KVCache,
    cached_ids: list[int],
    cached_images: Mapping[str, torch.Tensor] | None,
    ids: list[int],
    images: Mapping[str, torch.Tensor] | None,
) -> Reuse:
    """How much of a one-row prompt can be reused. The last id is always computed, for its logits.

    Args:
        spec: the model's spec.
        cache: cache of one row.
        cached_ids: ids in the cache, without prepended visual tokens.
        cached_images: image tensors in the cache.
        ids, images: those of the prompt.
    """
    if spec.bidirectional_prefix:  # the start of a prompt attends to its end
        return Reuse()
    length = _common(cached_ids, ids[:-1])
    same = same_images(cached_images, images)
    count = len(images["pixel_values"]) if images else 0
    if spec.text.cross_attention_layers or cache.num_prefix_tokens:
        return Reuse(length, count) if same and length else Reuse()
    if not images and not cached_images:
        return Reuse(length)
    if spec.image_token_index is None:  # placeholders are unknown outside the model
        return Reuse()
    equal = count if same else _equal_images(cached_images, images)
    places = [i for i, token in enumerate(ids) if token == spec.image_token_index]
    covered = sum(place < length for place in places)
    whole = min(covered // spec.tokens_per_image, equal)
    if covered > whole * spec.tokens_per_image:  # an image is reused whole or not at all
        length = places[whole * spec.tokens_per_image]
    return Reuse(length, whole)


def _common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    different = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(different, min(len(first), len(second)))


def _equal_images(
    first: Mapping[str, torch.Tensor] | None, second: Mapping[str, torch.Tensor] | None
) -> int:
    """Number of leading images that are equal."""
    if not first or not second or first.keys() != second.keys():
        return 0
    count = min(len(first["pixel_values"]), len(second["pixel_values"]))
    for index in range(count):
        if not all(torch.equal(first[name][index], second[name][index]) for name in first):
            return index
    return count
