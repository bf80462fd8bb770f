"""Inputs with images, the same for every engine on torch."""

import time
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


def tiled_prompt(config: Any, tiles: int, tokens: int) -> dict[str, torch.Tensor]:
    """Inputs of a Llama-3.2-Vision: a square image of some tiles, then tokens of text.

    Args:
        config: the model's.
        tiles: of the image, a square number.
        tokens: of text.
    """
    ids = torch.randint(3, config.text_config.vocab_size // 2, (1, tokens + 1))
    ids[:, 0] = config.image_token_index
    images = random_tiles(config.vision_config, tiles)
    mask = images["aspect_ratio_mask"][:, None].expand(-1, tokens + 1, -1, -1)  # (1, T, 1, tiles)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "cross_attention_mask": mask.contiguous(),
        **images,
    }


def timed_prompt(model: Any, dtype: torch.dtype, tokens: int) -> dict:
    """Prefill of one image and some tokens of text, by the call that transformers' models have.

    Args:
        model: a LLaVA or PaliGemma, ours or transformers'.
        dtype: of the pixels.
        tokens: of text.
    """
    config = model.config
    vision, side = config.vision_config, config.vision_config.image_size
    places = torch.full((1, (side // vision.patch_size) ** 2), config.image_token_index)
    ids = torch.cat([places, torch.randint(3, 20000, (1, tokens))], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    pixels = torch.randn(1, vision.num_channels, side, side, dtype=dtype)
    start = time.perf_counter()
    model(**inputs, pixel_values=pixels, use_cache=True, logits_to_keep=1)
    return {"seconds": time.perf_counter() - start, "tokens": ids.shape[1]}
