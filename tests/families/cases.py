"""One table of families, sizes and choices: a tiny model of stock transformers each, random
everywhere, and ours with the same weights.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

import twins
from mllama import MllamaForConditionalGeneration, SiglipModel

IMAGE = twins.IMAGE
TEXT = twins.SIZES | twins.ENDS | {"pad_token_id": 0}
WIDE = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
ODD = {
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 1,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Shorter than every row, and softcaps that the scores of these small models reach.
WINDOWS = {"sliding_window": 5, "query_pre_attn_scalar": 24}
SOFTCAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
VISION = twins.VISION | {"num_hidden_layers": 3}
PARTIAL = {
    "image_size": 23,
    "patch_size": 7,
    "hidden_size": 48,
    "num_attention_heads": 3,
}  # 3 x 3 patches, two pixels left over
SMALL = {"image_size": 12, "patch_size": 6, "num_hidden_layers": 2, "intermediate_size": 33}


def llama(**options: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | options))


def gemma(**options: Any) -> PreTrainedModel:
    return transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**TEXT | {"head_dim": 16} | options)
    )


def gemma2(**options: Any) -> PreTrainedModel:
    sizes = TEXT | {"head_dim": 16} | WINDOWS | SOFTCAPS
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes | options))


def gemma3(**options: Any) -> PreTrainedModel:
    sizes = TEXT | {"head_dim": 16} | WINDOWS
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes | layers | options))


def siglip(**options: Any) -> PreTrainedModel:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION | options))


def llava(
    kind: str,
    layer: int | list[int],
    strategy: str,
    text: dict | None = None,
    vision: dict | None = None,
    **options: Any,
):
    config = transformers.LlavaConfig(
        vision_config=VISION | {"model_type": kind} | (vision or {}),
        text_config=TEXT | {"model_type": "llama"} | (text or {}),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        **options,
    )
    if kind == "siglip_vision_model":  # the head has no part in a LLaVA
        config.vision_config.vision_use_head = False
    return transformers.LlavaForConditionalGeneration(config)


def paligemma(
    text: dict | None = None, vision: dict | None = None, image_token_index: int = IMAGE
) -> PreTrainedModel:
    text = TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32} | (text or {})
    vision = (
        VISION | {"model_type": "siglip_vision_model", "vision_use_head": False} | (vision or {})
    )
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token_index,
            projection_dim=text["hidden_size"],
            hidden_size=text["hidden_size"],
        )
    )


CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama, factor 8": lambda: llama(
        **WIDE, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0} | LLAMA3
    ),
    "llama, factor 32, tied, older spelling": lambda: llama(
        tie_word_embeddings=True,
        rope_theta=900.0,
        rope_scaling={"type": "llama3"} | LLAMA3 | {"factor": 32.0},
    ),
    "llama, odd sizes, biases": lambda: llama(
        **ODD | {"head_dim": 24}, attention_bias=True, mlp_bias=True
    ),
    "llama, linear": lambda: llama(
        rope_theta=500000.0, rope_scaling={"rope_type": "linear", "factor": 3.0}, head_dim=32
    ),
    "gemma": gemma,
    "gemma, as many key heads": lambda: gemma(**WIDE, head_dim=64),
    "gemma, odd sizes": lambda: gemma(**ODD | {"head_dim": 256}),
    "gemma2": gemma2,
    "gemma2, no softcaps, biases": lambda: gemma2(
        **WIDE,
        layer_types=MIXED_LAYERS,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        tie_word_embeddings=False,
    ),
    "gemma2, one wide window": lambda: gemma2(
        **ODD | {"num_hidden_layers": 2, "head_dim": 256, "sliding_window": 20}
    ),
    "gemma3": gemma3,
    "gemma3, scaled, softcap": lambda: gemma3(
        **WIDE,
        layer_types=MIXED_LAYERS,
        rope_theta=5000.0,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        final_logit_softcapping=2.0,
    ),
    "siglip_vision_model": siglip,
    "siglip_vision_model, headless": lambda: siglip(**SMALL, vision_use_head=False),
    "siglip_vision_model, partial patches": lambda: siglip(**PARTIAL),
    "llava, clip, -2": lambda: llava("clip_vision_model", -2, "default"),
    "llava, clip, several": lambda: llava(
        "clip_vision_model", [-1, 1, 0], "full", ODD | {"head_dim": 24}, PARTIAL
    ),
    "llava, clip, 2, tied": lambda: llava(
        "clip_vision_model",
        2,
        "full",
        WIDE | {"rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        SMALL,
    ),
    "llava, siglip, -1": lambda: llava("siglip_vision_model", -1, "full", tie_word_embeddings=True),
    "llava, siglip, several": lambda: llava(
        "siglip_vision_model", [1, -2], "default", WIDE, PARTIAL, multimodal_projector_bias=False
    ),
    "llava, siglip, -3": lambda: llava(
        "siglip_vision_model",
        -3,
        "full",
        ODD | {"head_dim": 24},
        SMALL,
        projector_hidden_act="relu",
    ),
    "paligemma": paligemma,
    "paligemma, placeholder beyond the vocabulary": lambda: paligemma(
        WIDE | {"head_dim": 64}, PARTIAL, image_token_index=200
    ),
    "paligemma, odd sizes": lambda: paligemma(ODD | {"head_dim": 256}, SMALL),
    "paligemma, gemma2": lambda: paligemma({"model_type": "gemma2"} | WINDOWS | SOFTCAPS),
    "paligemma, gemma2, partial patches": lambda: paligemma(
        {"model_type": "gemma2", "head_dim": 64} | WIDE | WINDOWS | {"layer_types": MIXED_LAYERS},
        PARTIAL,
        image_token_index=200,
    ),
}
TEXTS = [name for name in CASES if name.startswith(("llama", "gemma"))]
PICTURES = [name for name in CASES if name.startswith(("llava", "paligemma"))]
TALKING = TEXTS + PICTURES
ONE_EACH = [
    "llama",
    "gemma",
    "gemma2",
    "gemma3",
    "llava, clip, -2",
    "llava, siglip, several",
    "paligemma, placeholder beyond the vocabulary",
    "paligemma, gemma2",
]


class Pair(NamedTuple):
    """Ours and stock transformers' model, with the same weights, in eval mode. Shared by tests: to
    change one, `make` a new one.
    """

    ours: MllamaForConditionalGeneration | SiglipModel
    theirs: PreTrainedModel


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stock transformers' names in memory -> ours, written down apart from the tables of
    mllama.checkpoints.
    """
    weights = dict(weights)
    for kind in ("weight", "bias"):
        if (fused := weights.pop(f"head.attention.in_proj_{kind}", None)) is not None:
            weights |= {
                f"head.attention.{part}_proj.{kind}": piece
                for part, piece in zip("qkv", fused.chunk(3), strict=True)
            }
    if "model.language_model.norm.weight" in weights:
        return {name.removeprefix("model."): value for name, value in weights.items()}
    if "model.norm.weight" in weights:
        return {name.replace("model.", "language_model."): value for name, value in weights.items()}
    return {
        name if name.startswith("head.") else f"vision_tower.{name}": value
        for name, value in weights.items()
    }


def make(name: str, seed: int = 0) -> Pair:
    """A pair of a case of the table."""
    theirs = twins.randomise(CASES[name](), seed).eval()
    ours = (SiglipModel if name.startswith("siglip") else MllamaForConditionalGeneration)(
        theirs.config
    ).eval()
    report = torch.nn.Module.load_state_dict(ours, renamed(theirs.state_dict()))
    assert not report.missing_keys and not report.unexpected_keys
    return Pair(ours, theirs)


pair = functools.cache(make)


def ids(length: int, seed: int = 2) -> list[int]:
    """Random ids that are neither padding nor the placeholder."""
    return twins.tokens(length, seed)


def pictures(pair: Pair, count: int, seed: int = 1) -> torch.Tensor:
    """float [count, 3, S, S] for the model's tower."""
    config = getattr(pair.theirs.config, "vision_config", pair.theirs.config)
    return torch.randn(
        count,
        3,
        config.image_size,
        config.image_size,
        generator=torch.Generator().manual_seed(seed),
    )


# Rows of a batch: "P" is a picture, a number that many words.
ROWS = {
    "one picture": (["P", 7], ["P", 3]),
    "two pictures": ([2, "P", 3, "P", 2], ["P", 4]),
    "a row without a picture": (["P", "P", 5], [6], [1, "P", 2]),
    "no picture": ([9], [4]),
    "one row": ([3, "P", 5],),
    "long": (["P", 60], ["P", 31]),
}


def inputs(
    pair: Pair, rows: str | tuple = "one picture", side: str = "left", said: int = 0
) -> dict[str, torch.Tensor]:
    """A batch of `ROWS` for a model, without their pictures where it has none; of PaliGemma, whose
    pictures come first, with `token_type_ids` by which the last `said` words of a row are the
    answer's.
    """
    rows = ROWS[rows] if isinstance(rows, str) else rows
    count = sum(part == "P" for row in rows for part in row)
    if not (model := pair.ours).spec.fusion:
        rows, count = [[part for part in row if part != "P"] for row in rows], 0
    placeholder = [getattr(model.config, "image_token_index", None)] * model.spec.tokens_per_image
    lists = [
        [
            i
            for k, part in enumerate(row)
            for i in (placeholder if part == "P" else ids(part, seed=7 * r + k))
        ]
        for r, row in enumerate(rows)
    ]
    batch = twins.batch(*lists, side=side)
    if count:
        batch["pixel_values"] = pictures(pair, count)
    if model.spec.bidirectional_prefix:
        types = torch.zeros_like(batch["input_ids"])
        for r, row in enumerate(lists):
            end = types.shape[1] if side == "left" else len(row)
            types[r, end - said : end] = 1
        batch["token_type_ids"] = types
    return batch


def close(
    ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4, floor: float = 0.0
) -> None:
    """Within `tolerance` of the largest value, or of `floor` where that is larger."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max().item(), floor)
