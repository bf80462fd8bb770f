"""Tiny models of stock transformers, one per format, every parameter random."""

import torch
import transformers
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

import twins
from families import cases

ROPE = {"rope_type": "llama3"} | cases.LLAMA3


def _mllama():
    vision = {
        name: value for name, value in cases.VISION.items() if name != "num_attention_heads"
    } | {
        "attention_heads": 2,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 3 * cases.VISION["hidden_size"],
        "model_type": MllamaVisionConfig.model_type,
    }
    text = cases.TEXT | {
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "bos_token_id": 1,
        "rope_scaling": dict(ROPE),
    }
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=text, image_token_index=cases.TEXT["vocab_size"]
    )
    return transformers.MllamaForConditionalGeneration(config)


def _siglip():
    text = {
        name: value
        for name, value in cases.VISION.items()
        if name not in ("image_size", "patch_size")
    } | {"vocab_size": 50}
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=cases.VISION)
    )


def _llava_with_a_head():
    """As stock makes them where the config does not say: SigLIP's pooling head is there and unused."""
    config = cases.llava("siglip_vision_model", -1, "full").config
    config.vision_config.vision_use_head = True
    return transformers.LlavaForConditionalGeneration(config)


MAKERS = {
    "llama": cases.llama,
    "llama, tied": lambda: cases.llama(tie_word_embeddings=True),
    "llama, scaled": lambda: cases.llama(rope_scaling=dict(ROPE)),
    "gemma": cases.gemma,
    "gemma2": cases.gemma2,
    "gemma3_text": cases.gemma3,
    "siglip_vision_model": cases.siglip,
    "siglip_vision_model, headless": lambda: cases.siglip(vision_use_head=False),
    "siglip": _siglip,
    "llava, siglip": _llava_with_a_head,
    "llava, clip": lambda: cases.llava(
        "clip_vision_model", -2, "default", tie_word_embeddings=True
    ),
    "paligemma": cases.paligemma,
    "paligemma, gemma2": cases.CASES["paligemma, gemma2"],
    "mllama": _mllama,
}


def make(case: str, seed: int = 0) -> torch.nn.Module:
    """A stock model in eval mode, random everywhere."""
    return twins.randomise(MAKERS[case](), seed).eval()
