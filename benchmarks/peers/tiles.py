"""Inputs of Llama-3.2-Vision's encoder."""

from typing import Any

import torch


def random_tiles(config: Any, tiles: int) -> dict[str, torch.Tensor]:
    """pixel_values, aspect_ratio_ids and aspect_ratio_mask of a square image.

    Args:
        config: the encoder's.
        tiles: of the image, a square number. The others are zero.
    """
    shape = (config.max_num_tiles, config.num_channels, config.image_size, config.image_size)
    mask = (torch.arange(config.max_num_tiles) < tiles).long()
    side = round(tiles**0.5)
    ratio = [list(pair) for pair in config.supported_aspect_ratios].index([side, side])
    return {
        "pixel_values": (torch.randn(shape) * mask[:, None, None, None])[None, None],
        "aspect_ratio_ids": torch.tensor([[ratio + 1]]),
        "aspect_ratio_mask": mask[None, None],
    }
