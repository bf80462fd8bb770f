"""PaliGemma 1 and 2: a SigLIP, a linear projector and a Gemma or Gemma 2, with LLaVA's names."""

from mllama.config.parts import vision_spec
from mllama.config.spec import ModelSpec, count_patches
from mllama.families import gemma, gemma2, llava, siglip
from mllama.weights.family import Config, Family

DEFAULTS: Config = {
    "vision_config": siglip.DEFAULTS
    | {
        "hidden_size": 1152,
        "intermediate_size": 4096,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": gemma.DEFAULTS
    | {
        "vocab_size": 257152,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "image_token_index": 256000,
    "projection_dim": 2048,
    "tie_word_embeddings": True,
}

_TEXTS = {"gemma": gemma.gemma_text, "gemma2": gemma2.gemma2_text}


def _settle(config: Config) -> Config:
    """Apply the top-level tie setting, and bidirectional prompts by default."""
    text = config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}
    if text["use_bidirectional_attention"] is None:
        text["use_bidirectional_attention"] = True
    return config | {"text_config": text}


def _read(config: Config) -> ModelSpec:
    vision = vision_spec(config["vision_config"] | {"vision_use_head": False})
    text = _TEXTS[config["text_config"]["model_type"]](config["text_config"])
    if config["projection_dim"] != text.hidden_size:
        raise ValueError(
            f"config: projection_dim {config['projection_dim']!r} must be the decoder's "
            f"hidden_size {text.hidden_size}"
        )
    return ModelSpec(
        text=text,
        encoder="siglip",
        vision=vision,
        projector="linear",
        projector_sizes=(vision.hidden_size, 0, text.hidden_size),
        fusion="merge",
        tokens_per_image=count_patches(vision),
        bidirectional_prefix=True,
        image_token_index=llava.check_image_token(config),
    )


FAMILY = Family(
    name="paligemma",
    defaults=DEFAULTS,
    parts={"vision_config": (siglip.DEFAULTS,), "text_config": (gemma.DEFAULTS, gemma2.DEFAULTS)},
    read=_read,
    settle=_settle,
    weight_map=lambda spec: llava.WEIGHT_MAP,
    stock_class="PaliGemmaForConditionalGeneration",
    processor="paligemma",
    stock_processor="PaliGemmaProcessor",
    stock_prefixes=llava.STOCK_PREFIXES,
    write=llava.write,
)
