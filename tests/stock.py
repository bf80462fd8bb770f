"""Tiny models of stock transformers, one per format, every parameter random."""

import torch
import transformers
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

import twins

TEXT = twins.TEXT | {"pad_token_id": None}
VISION = twins.VISION
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def _llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **options))


def _gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**TEXT, head_dim=16))


def _llava(kind: str, **options):
    vision = VISION | {"model_type": kind}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=TEXT | {"model_type": "llama"}, image_token_index=twins.IMAGE, **options)
    )


def _paligemma():
    text = TEXT | {"model_type": "gemma", "head_dim": 16}
    vision = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    sizes = {"projection_dim": TEXT["hidden_size"], "image_token_index": twins.IMAGE}
    return transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(vision_config=vision, text_config=text, **sizes))


def _mllama():
    vision = {name: value for name, value in VISION.items() if name != "num_attention_heads"} | {
        "attention_heads": 2,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 3 * VISION["hidden_size"],
        "model_type": MllamaVisionConfig.model_type,
    }
    text = TEXT | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], "pad_token_id": 0, "rope_scaling": dict(ROPE)}
    text["bos_token_id"] = 1
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY)
    return transformers.MllamaForConditionalGeneration(config)


def _siglip():
    text = {name: value for name, value in VISION.items() if name not in ("image_size", "patch_size")} | {"vocab_size": 50}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))


VOCABULARY = TEXT["vocab_size"]
MAKERS = {
    "llama": _llama,
    "llama, tied": lambda: _llama(tie_word_embeddings=True),
    "llama, scaled": lambda: _llama(rope_scaling=dict(ROPE)),
    "gemma": _gemma,
    "siglip_vision_model": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    "siglip_vision_model, headless": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    ),
    "siglip": _siglip,
    "llava, siglip": lambda: _llava("siglip_vision_model", vision_feature_layer=-1, vision_feature_select_strategy="full"),
    "llava, clip": lambda: _llava("clip_vision_model", tie_word_embeddings=True),
    "paligemma": _paligemma,
    "mllama": _mllama,
}


def make(case: str, seed: int = 0) -> torch.nn.Module:
    """A stock model in eval mode, random everywhere."""
    return twins.randomise(MAKERS[case](), seed).eval()
