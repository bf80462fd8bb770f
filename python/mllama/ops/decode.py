"""`decode_step`: a few new positions through all layers of a packed decoder."""

import torch

from mllama import _ext
from mllama.ops._dispatch import check_device, fresh


def decode_step(
    decoder: int,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    length: torch.Tensor,
    first_key: torch.Tensor | None,
    image_keys: int,
    image_mask: torch.Tensor | None,
    sees_image: torch.Tensor | None,
) -> torch.Tensor:
    """Run new positions of each row of a batch, and append their keys and values to a cache.

    Args:
        decoder: what `_decoder_new` returned; `model/fast_decoder.py` describes decoders.
        hidden: float32 [B, T, hidden], embeddings of B * T positions, 1 to 16. Overwritten.
        positions: int64 [B, T], for rotary embeddings.
        keys, values: of each layer, [B, kv_heads, capacity, head_dim] of float32, bfloat16 or
            float16, or int8 [B, kv_heads, capacity, row_bytes(head_dim)]. A layer that attends to
            text gets the new positions at `length`; one that attends to images is only read.
        length: int64 [1], positions before the new ones, on the device of the others.
        first_key: int64 [B], the padding before a row's first key. Default: none.
        image_keys: of the layers that attend to images; with 0 these do nothing. 0 where there are
            no such layers.
        image_mask: bool [B, image_keys], which of them a row attends to. Default: all.
        sees_image: bool [B * T], False for positions whose feed-forward blocks of those layers do
            nothing. Default: all True.

    Returns:
        float32 [B, T, hidden], after the last norm.

    Raises:
        ValueError or RuntimeError: a decoder, size, dtype or device that does not fit.
    """
    return torch.ops.mllama.decode_step(
        decoder,
        hidden,
        positions,
        keys,
        values,
        length,
        first_key,
        image_keys,
        image_mask,
        sees_image,
    )


def _fake(
    decoder, hidden, positions, keys, values, length, first_key, image_keys, image_mask, sees_image
):
    # A call that mixes meta and real tensors comes here, too: its result would be any bytes.
    tensors = {
        "positions": positions,
        "length": length,
        "first_key": first_key,
        "image_mask": image_mask,
        "sees_image": sees_image,
        **{f"keys[{layer}]": x for layer, x in enumerate(keys)},
        **{f"values[{layer}]": x for layer, x in enumerate(values)},
    }
    for name, x in tensors.items():
        if x is not None and x.numel():  # a layer that has no keys has an empty tensor
            check_device("decode_step", name, x, "hidden", hidden)
    return fresh(hidden)


if _ext.load() is not None:
    torch.library.register_fake("mllama::decode_step", _fake)
    # A decoder of fake tensors is none: numbers begin with 1.
    torch.library.register_fake("mllama::_decoder_new", lambda tensors, sizes, numbers: 0)
    torch.library.register_fake("mllama::_decoder_free", lambda decoder: None)
