"""A LoRA training step: adapters of rank 16 in float32 on all linear layers of the decoder, beside
transformers with PEFT and the same with a loss in chunks.
"""

import gc
from collections.abc import Callable, Iterator

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from benchmarks.harness import DTYPES, Case, saved_bytes
from benchmarks.models.bench_llama import CONFIG
from benchmarks.models.training import (
    chunked_loss,
    our_loss,
    pair,
    peak_bytes,
    their_loss,
    training_step,
)

PEER = "transformers and PEFT's LoRA, sdpa; and with the loss computed in chunks"
RANK, TOKENS = 16, 512
TEXT = CONFIG | {"vocab_size": 128256}
IMAGE = 128255
VISION = {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16}
TILED = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "attention_heads": 8,
    "num_hidden_layers": 8,
    "num_global_layers": 2,
    "intermediate_layers_indices": [1, 3, 5],
    "vision_output_dim": 2560,
    "image_size": 224,
    "patch_size": 14,
    "max_num_tiles": 4,
}
Batch = dict[str, torch.Tensor]


def llama(
    labeled: int | None = None, text: dict = TEXT, tokens: int = TOKENS
) -> tuple[LlamaConfig, type, Batch]:
    """Four of the sixteen layers of Llama-3.2-1B; the last `labeled` tokens (default: all) are
    trained.
    """
    ids = torch.randint(0, text["vocab_size"] - 1, (1, tokens))
    return LlamaConfig(**text), LlamaForCausalLM, _batch(ids, labeled or tokens)


def siglip_llama(
    text: dict = TEXT, vision: dict = VISION, image: int = IMAGE
) -> tuple[LlavaConfig, type, Batch]:
    """SigLIP-base before two layers of Llama-3.2-1B; an image, 60 tokens, the last 40 trained."""
    config = LlavaConfig(
        vision_config=vision | {"vision_use_head": False},
        text_config=text | {"model_type": "llama", "num_hidden_layers": 2},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=image,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    size = vision["image_size"]
    ids = torch.randint(0, image, (1, (size // vision["patch_size"]) ** 2 + 60))
    ids[:, 10:-50] = image
    batch = _batch(ids, 40) | {"pixel_values": torch.randn(1, 3, size, size)}
    return config, LlavaForConditionalGeneration, batch


def llama_vision(
    text: dict = TEXT, vision: dict = TILED, image: int = IMAGE
) -> tuple[MllamaConfig, type, Batch]:
    """Llama-3.2-Vision with smaller widths, eight layers and two global ones in the tower and eight
    in the decoder, two of which attend to the image; an image of four tiles and 256 tokens, the
    last 128 an answer.
    """
    layers = text | {
        "hidden_size": text["hidden_size"] // 2,
        "intermediate_size": text["intermediate_size"] // 2,
        "num_attention_heads": text["num_attention_heads"] // 2,
        "num_hidden_layers": 8,
        "cross_attention_layers": [3, 6],
        "tie_word_embeddings": False,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    config = MllamaConfig(vision_config=vision, text_config=layers, image_token_index=image)
    ids = torch.randint(1, image, (1, 256))
    ids[:, 5] = image
    mask = torch.ones(1, 256, 1, vision["max_num_tiles"], dtype=torch.long)
    mask[:, :5] = 0
    size = vision["image_size"]
    batch = _batch(ids, 128) | {
        "pixel_values": torch.randn(1, 1, vision["max_num_tiles"], 3, size, size),
        "aspect_ratio_ids": torch.tensor([[6]]),  # two rows of two tiles
        "aspect_ratio_mask": torch.ones(1, 1, vision["max_num_tiles"], dtype=torch.long),
        "cross_attention_mask": mask,
    }
    return config, MllamaForConditionalGeneration, batch


def _batch(ids: torch.Tensor, labeled: int) -> Batch:
    labels = ids.clone()
    labels[:, : ids.shape[1] - labeled] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


SETUPS: dict[str, Callable[[], tuple]] = {
    "Llama, 512 tokens, all labeled": llama,
    "Llama, 512 tokens, 128 labeled": lambda: llama(128),
    "SigLIP + Llama": siglip_llama,
    "Llama-3.2-Vision": llama_vision,
}


def memory(model: torch.nn.Module, loss: Callable, batch: Batch) -> tuple[int, int]:
    """Bytes saved for the backward pass, without parameters, and the most above the weights in a
    step, with AdamW's state.
    """
    saved = saved_bytes(lambda: loss(model, batch), model.parameters())
    step = training_step(model, loss, batch)
    peak = peak_bytes(step)
    return saved, peak


def cases() -> Iterator[Case | str]:
    """Every setup and dtype: bytes, and the step against either peer."""
    for shape, setup in SETUPS.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            config, make, batch = setup()
            ours, theirs = pair(config, make, RANK, dtype)
            mine = memory(ours, our_loss, batch)
            for peer, loss in (("PEFT", their_loss), ("PEFT, chunks", chunked_loss)):
                other = memory(theirs, loss, batch)
                saved, peak = (
                    f"{one / 1e6:.0f} MB of {two / 1e6:.0f} ({one / two:.0%})"
                    for one, two in zip(mine, other, strict=True)
                )
                name = f"{shape}, {str(dtype).removeprefix('torch.')}"
                yield f"{name}, ours of {peer}'s: saved for backward {saved}, peak {peak}"
                steps = (training_step(ours, our_loss, batch), training_step(theirs, loss, batch))
                yield Case(shape, dtype, f"step, {peer}", *steps)
            del ours, theirs, steps
            gc.collect()  # models that refer to themselves
