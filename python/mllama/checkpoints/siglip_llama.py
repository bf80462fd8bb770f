"""SigLIP + Llama on disk: Hugging Face's LLaVA where the model has that shape, else our own `siglip_llama`, with the same tensor names."""

from typing import Any

from mllama.checkpoints.engine import Drop, Rename
from mllama.checkpoints.formats import Format
from mllama.config import MllamaConfig

TABLE = (
    # LLaVA reads patches; a released SigLIP tower's pooling head has no part in it.
    Drop("vision_tower.vision_model.head.*"),
    Drop("vision_tower.head.*"),
    # `also`: what transformers 5 writes, and its names in memory.
    Rename(
        "vision_tower.*",
        "vision_tower.vision_model.*",
        also=("vision_tower.*", "model.vision_tower.vision_model.*", "model.vision_tower.*"),
    ),
    Rename("multi_modal_projector.*", "multi_modal_projector.*", also=("model.multi_modal_projector.*",)),
    Rename("language_model.*", "language_model.model.*", also=("model.language_model.*",)),
    Rename("lm_head.weight", "language_model.lm_head.weight", also=("lm_head.weight",)),
)


def is_llava(config: MllamaConfig) -> bool:
    """Whether Hugging Face's LLaVA can be this model: features before the final norm, a projector as wide inside as the decoder, and a
    placeholder that has a row in the embedding matrix."""
    return (
        config.vision_feature == "pre_norm"
        and config.projection_dim == config.text_config.hidden_size
        and config.image_token_index is not None
        and config.image_token_index < config.text_config.vocab_size
    )


def llava_to_file(config: MllamaConfig) -> dict[str, Any]:
    """The content of a LLaVA config.json."""
    content = config.to_diff_dict()
    text = content["text_config"]
    # The older pair of names, which every version of transformers and vLLM reads.
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": config.ignore_index,
        "image_seq_length": config.text_config.num_image_tokens,
        "image_token_index": config.image_token_index,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "projector_hidden_act": config.projector_hidden_act,
        "text_config": text,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vision_config": content["vision_config"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def llava_from_file(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `MllamaConfig` from a LLaVA config.json.

    Raises:
        ValueError: a LLaVA that is no SigLIP + Llama, or reads other features than its tower's last layer.
    """
    for name, default, taken in (
        ("vision_feature_layer", -2, (-1, [-1])),
        ("vision_feature_select_strategy", "default", ("full",)),
    ):
        value = given.get(name, default)
        if value not in taken:
            raise ValueError(f"config.json: {name} = {value!r} is not supported; {taken[0]!r} is")
    for name, default, taken in (("vision_config", "clip_vision_model", "siglip_vision_model"), ("text_config", "llama", "llama")):
        part = given.get(name)
        kind = part.get("model_type", default) if isinstance(part, dict) else default
        if kind != taken:
            raise ValueError(f"config.json: a {name} of model_type {kind!r} is not supported; {taken!r} is")
    same = ("vision_config", "text_config", "ignore_index", "multimodal_projector_bias", "projector_hidden_act", "tie_word_embeddings")
    return {name: given[name] for name in same if name in given} | {
        "image_token_index": given.get("image_token_index", given.get("image_token_id", 32000)),
        "vision_feature": "pre_norm",
    }


def own_to_file(config: MllamaConfig) -> dict[str, Any]:
    """The content of our own config.json."""
    return config.to_diff_dict() | {"architectures": ["MllamaForConditionalGeneration"]}


LLAVA = Format(MllamaConfig, lambda config: TABLE, lambda content: MllamaConfig(**llava_from_file(content)), llava_to_file)
FORMAT = Format(MllamaConfig, lambda config: TABLE, lambda content: MllamaConfig(**content), own_to_file)
