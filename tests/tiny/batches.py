"""Inputs of the tiny models."""

import math

import torch
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tiny.sizes import IMAGE, TILED_IMAGE, VISION


def images(count: int, seed: int = 1, size: int = VISION["image_size"]) -> torch.Tensor:
    """float [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(length: int, seed: int = 2) -> list[int]:
    """Random ids that are neither padding (0) nor the placeholder."""
    return torch.randint(
        1, IMAGE, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def batch(*rows: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows of ids padded to one length: input_ids and attention_mask."""
    longest = max(map(len, rows))
    ids, mask = (
        torch.zeros(len(rows), longest, dtype=torch.long),
        torch.zeros(len(rows), longest, dtype=torch.long),
    )
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def texts(side: str = "left") -> dict[str, torch.Tensor]:
    """Two rows of text, the second one shorter."""
    return batch(tokens(7), tokens(4, 5), side=side)


def tiled(model, *rows: tuple[list[int], list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """A batch for Llama-3.2-Vision, as the processor makes it.

    Args:
        model: whose config it fits.
        rows: ids with placeholders (`TILED_IMAGE`), and the aspect ratio id of each image.
        side: where shorter rows are padded.
    """
    padded = batch(*(ids for ids, _ in rows), side=side)
    if not any(ratios for _, ratios in rows):
        return padded
    pixels, ratio_ids, tile_mask = tiles(model.config.vision_config, [row for _, row in rows])
    count = tile_mask.shape[-1]
    spans = [
        get_cross_attention_token_mask(row, TILED_IMAGE) for row in padded["input_ids"].tolist()
    ]
    num_tiles = [
        mask[: len(row)].sum(-1).tolist() for mask, (_, row) in zip(tile_mask, rows, strict=True)
    ]
    mask = convert_sparse_cross_attention_mask_to_dense(
        spans, num_tiles, count, padded["input_ids"].shape[1]
    )
    return padded | {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": tile_mask,
        "cross_attention_mask": torch.from_numpy(mask),
    }


def tiles(vision, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pixels in the tiles that each row's aspect ratio ids fill, zeros in the others.

    Args:
        vision: config of the encoder.
        rows: aspect ratio ids of each row's images; fewer than the longest row's are padded.

    Returns:
        (pixels [B, N, tiles, C, S, S], aspect ratio ids [B, N], mask [B, N, tiles], whose first
        tile is always set)
    """
    most = max(map(len, rows))
    ratio_ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    counts = [1] + [math.prod(ratio) for ratio in vision.supported_aspect_ratios]
    filled = torch.tensor(counts)[ratio_ids][..., None] > torch.arange(vision.max_num_tiles)
    size = (vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(*filled.shape, *size, generator=torch.Generator().manual_seed(5))
    pixels = pixels * (filled & (ratio_ids > 0)[..., None])[..., None, None, None]
    return pixels, ratio_ids, filled.long()
