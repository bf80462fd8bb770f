"""One table of tiny models of stock transformers: families, sizes and choices."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import transformers
from transformers import PreTrainedModel

from tiny.models import randomize
from tiny.sizes import (
    CROSSED_TEXT,
    ENDS,
    FACTORS,
    IMAGE,
    LLAMA3,
    MIXED_LAYERS,
    ODD,
    PARTIAL,
    SIZES,
    SMALL,
    SOFTCAPS,
    TILED_IMAGE,
    VISION,
    WIDE,
    WINDOWS,
    tiled_vision,
)

TEXT = SIZES | ENDS | {"pad_token_id": 0}
DEEPER = VISION | {"num_hidden_layers": 3}
# Configs of transformers change the rope parameters that they are given: hence the copies.


def llama(**options: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**deepcopy(TEXT | options)))


def gemma(**options: Any) -> PreTrainedModel:
    sizes = TEXT | {"head_dim": 16}
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes | options))


def gemma2(**options: Any) -> PreTrainedModel:
    sizes = TEXT | {"head_dim": 16} | WINDOWS | SOFTCAPS
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes | options))


def gemma3(**options: Any) -> PreTrainedModel:
    sizes = TEXT | {"head_dim": 16} | WINDOWS
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**deepcopy(sizes | layers | options))
    )


def siglip_vision(**options: Any) -> PreTrainedModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**DEEPER | options))


def siglip() -> PreTrainedModel:
    """Both encoders, as SigLIP is published."""
    text = {key: DEEPER[key] for key in DEEPER if key not in ("image_size", "patch_size")}
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=DEEPER)
    )


def llava(
    encoder: str,
    layer: int | list[int],
    strategy: str,
    text: dict | None = None,
    vision: dict | None = None,
    head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`head`: with SigLIP's pooling head, which is unused, as where the config does not say."""
    config = transformers.LlavaConfig(
        vision_config=DEEPER | {"model_type": f"{encoder}_vision_model"} | (vision or {}),
        text_config=deepcopy(TEXT | {"model_type": "llama"} | (text or {})),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        **{"image_token_index": IMAGE} | options,
    )
    if encoder == "siglip":
        config.vision_config.vision_use_head = head
    return transformers.LlavaForConditionalGeneration(config)


def paligemma(
    text: dict | None = None, vision: dict | None = None, image_token_index: int = IMAGE
) -> PreTrainedModel:
    text = TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32} | (text or {})
    headless = {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = transformers.PaliGemmaConfig(
        vision_config=DEEPER | headless | (vision or {}),
        text_config=text,
        image_token_index=image_token_index,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def mllama(
    text: dict | None = None, vision: dict | None = None, image_token_index: int = TILED_IMAGE
) -> PreTrainedModel:
    config = transformers.MllamaConfig(
        vision_config=tiled_vision(**vision or {}),
        text_config=deepcopy(CROSSED_TEXT | (text or {})),
        image_token_index=image_token_index,
    )
    return transformers.MllamaForConditionalGeneration(config)


MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "llama, factor 8": partial(llama, **WIDE, rope_parameters=LLAMA3 | {"rope_theta": 500.0}),
    "llama, factor 32, tied, older spelling": partial(
        llama,
        tie_word_embeddings=True,
        rope_theta=900.0,
        rope_scaling={"type": "llama3"} | FACTORS | {"factor": 32.0},
    ),
    "llama, odd sizes, biases": partial(
        llama, **ODD | {"head_dim": 24}, attention_bias=True, mlp_bias=True
    ),
    "llama, linear": partial(
        llama, rope_theta=500000.0, rope_scaling={"rope_type": "linear", "factor": 3.0}, head_dim=32
    ),
    "gemma": gemma,
    "gemma, as many key heads": partial(gemma, **WIDE, head_dim=64),
    "gemma, odd sizes": partial(gemma, **ODD | {"head_dim": 256}),
    "gemma2": gemma2,
    "gemma2, no softcaps, biases": partial(
        gemma2,
        **WIDE,
        layer_types=MIXED_LAYERS,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma2, one wide window": partial(
        gemma2, **ODD | {"num_hidden_layers": 2, "head_dim": 256, "sliding_window": 20}
    ),
    "gemma3_text": gemma3,
    "gemma3_text, scaled, softcap": partial(
        gemma3,
        **WIDE,
        layer_types=MIXED_LAYERS,
        rope_theta=5000.0,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        final_logit_softcapping=2.0,
    ),
    "siglip": siglip,
    "siglip_vision_model": siglip_vision,
    "siglip_vision_model, headless": partial(siglip_vision, **SMALL, vision_use_head=False),
    "siglip_vision_model, partial patches": partial(siglip_vision, **PARTIAL),
    "llava, clip, -2": partial(llava, "clip", -2, "default"),
    "llava, clip, several": partial(
        llava, "clip", [-1, 1, 0], "full", ODD | {"head_dim": 24}, PARTIAL
    ),
    "llava, clip, 2, tied": partial(
        llava, "clip", 2, "full", WIDE | {"rope_scaling": LLAMA3}, SMALL, tie_word_embeddings=True
    ),
    "llava, siglip, -1": partial(llava, "siglip", -1, "full", tie_word_embeddings=True),
    "llava, siglip, several": partial(
        llava, "siglip", [1, -2], "default", WIDE, PARTIAL, multimodal_projector_bias=False
    ),
    "llava, siglip, -3": partial(
        llava, "siglip", -3, "full", ODD | {"head_dim": 24}, SMALL, projector_hidden_act="relu"
    ),
    "llava, siglip, unused head": partial(llava, "siglip", -1, "full", head=True),
    "paligemma": paligemma,
    "paligemma, placeholder beyond the vocabulary": partial(
        paligemma, WIDE | {"head_dim": 64}, PARTIAL, image_token_index=200
    ),
    "paligemma, odd sizes": partial(paligemma, ODD | {"head_dim": 256}, SMALL),
    "paligemma, gemma2": partial(paligemma, {"model_type": "gemma2"} | WINDOWS | SOFTCAPS),
    "paligemma, gemma2, partial patches": partial(
        paligemma,
        {"model_type": "gemma2", "head_dim": 64} | WIDE | WINDOWS | {"layer_types": MIXED_LAYERS},
        PARTIAL,
        image_token_index=200,
    ),
    "mllama": mllama,
}
# What tests of files read: every format, tied and not, scaled and not, with parts that go unused.
FORMATS = [
    "llama",
    "llama, factor 8",
    "llama, factor 32, tied, older spelling",
    "gemma",
    "gemma2",
    "gemma3_text",
    "siglip",
    "siglip_vision_model",
    "siglip_vision_model, headless",
    "llava, siglip, unused head",
    "llava, clip, 2, tied",
    "paligemma",
    "paligemma, gemma2",
    "mllama",
]


def make(name: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model of the table in eval mode, random everywhere; the options go to its maker."""
    return randomize(MAKERS[name](**options), seed).eval()
