"""transformers config objects of a SigLIP + Llama model. Its family checks the values; these
classes store them.
"""

import os
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, SiglipVisionConfig

from mllama.config.files import harmless
from mllama.config.parts import vision_spec
from mllama.families import family_of, siglip_llama
from mllama.families.siglip_llama import FAMILY, FOR_TEXT, TEXT, VISION
from mllama.hf.compat import config_fields
from mllama.hf.config_checks import check_common, check_names, construct
from mllama.weights.family import Config, complete

# Output fields that are not predictions: Trainer's evaluation would keep them all for
# compute_metrics.
NO_PREDICTIONS = (
    "cache",
    "past_key_values",
    "image_hidden_states",
    "image_attentions",
    "num_trained_tokens",
)

# Names of fields in older scripts.
_NO_FIELDS = {
    "emb_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "n_kv_groups": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "rope_base": "rope_theta",
    "rope_freq": "rope_scaling",
}


class MllamaVisionConfig(SiglipVisionConfig):
    """SigLIP's vision configuration, without a pooling head.

    Raises:
        ValueError: a size is not a positive integer, or sizes do not fit each other; the message
            names the field.
    """

    def __init__(self, **kwargs):
        given = _settled("vision_config", type(self), kwargs, VISION) | {"vision_use_head": False}
        vision_spec(given)
        construct("vision_config", super().__init__, given)


class MllamaTextConfig(LlamaConfig):
    """The decoder's configuration: Llama's, with fields of other decoders.

    Attributes:
        num_image_tokens: features per image; set by `MllamaConfig`.
        norm_offset: added to the norms' weights (Gemma: 1).
        embedding_scale: factor on the embeddings (Gemma: sqrt(hidden_size)). Default: 1.
        extra_embeddings: rows of the embedding matrix beyond the vocabulary, which have no logits
            (Llama-3.2-Vision: 8).
        cross_attention_layers: must be None; `MllamaConfig.cross_attention_every` adds
            cross-attention layers.

    Raises:
        ValueError: a size is not a positive integer, or sizes do not fit each other; the message
            names the field.
    """

    num_image_tokens: int | None = None
    norm_offset: float = 0.0
    embedding_scale: float | None = None
    extra_embeddings: int = 0
    cross_attention_layers: list[int] | None = None

    def __init__(self, **kwargs):
        given = _settled("text_config", type(self), kwargs, TEXT)
        siglip_llama.check_text(given)
        construct("text_config", super().__init__, given)


def _settled(owner: str, kind: type[PretrainedConfig], given: Config, defaults: Config) -> Config:
    """The arguments of a part's config with defaults filled in, in one spelling."""
    given = dict(given)
    found = given.pop("model_type", kind.model_type)
    if found != kind.model_type:
        raise ValueError(f"{owner}: model_type must be {kind.model_type!r}, got {found!r}")
    check_names(owner, kind, given)
    for name in _NO_FIELDS.keys() & given.keys():  # transformers would ignore it
        raise ValueError(f"{owner}: {name} is not a field; use {_NO_FIELDS[name]}")
    check_common(owner, given)
    settled = complete(owner, given, defaults)
    settled.pop("model_type")
    return settled


def _as_dict(name: str, given: Any) -> Config | None:
    """A sub-config as a dict."""
    if isinstance(given, PretrainedConfig):
        return config_fields(given)
    if not isinstance(given, (dict, type(None))):
        raise TypeError(
            f"{name} must be a dict, a config object or None, got {type(given).__name__}"
        )
    return given


class MllamaConfig(PretrainedConfig):
    """Configuration of a SigLIP encoder, a projector, and a Llama decoder that uses the image
    features in one of three ways.

    Args:
        vision_config: dict or config of the SigLIP encoder; fields as in `MllamaVisionConfig`.
            Default: SigLIP-base's sizes.
        text_config: dict or config of the Llama decoder; fields as in `MllamaTextConfig`. Default:
            Llama's defaults.
        ignore_index: label that is not trained.
        image_token_index: id of the `<image>` placeholder. Default: with "merge" the model finds
            it by its runs, whose lengths are multiples of `text_config.num_image_tokens`; else
            there is none. It may lie outside the vocabulary, because it is never embedded, except
            with "cross_attention", which does not use it.
        vocab_size, hidden_size, pad_token_index: for the decoder, if `text_config` does not set
            them.
        projector: "mlp", two layers with an activation between them, or "linear", one layer from
            the encoder's width to the decoder's.
        projection_dim: width between the layers of an "mlp". Default, and always with "linear":
            the decoder's width.
        vision_feature: "last" reads the encoder's output after its final norm, "pre_norm" before
            it, as LLaVA's layer -1.
        projector_hidden_act: activation of an "mlp", by transformers' name.
        multimodal_projector_bias: whether the projector's layers have biases.
        fusion: how the decoder uses images. "merge": every patch replaces a placeholder in the
            text. "prepend": patches are pooled to a few visual tokens before the text.
            "cross_attention": added gated layers attend from text to patches; their gates are
            initially zero, so the text model's output is unchanged at first.
        num_image_tokens: with "prepend", number of visual tokens per image, from 1 to the number
            of patches (the default).
        image_pooling: with "prepend", "average" (the default; `torch.nn.AdaptiveAvgPool1d` over
            patches) or "learned" (a matrix over patches).
        cross_attention_every: with "cross_attention", add a layer after this many of
            `text_config.num_hidden_layers`. Default: 4, or all layers of a shorter decoder.

    Attributes:
        text_config.num_image_tokens: features per image, and placeholders if it has some:
            `num_image_tokens`, or without pooling `(image_size // patch_size) ** 2`. Set here.

    Raises:
        ValueError: a size or choice is invalid; the message names the field.
        TypeError: a sub-config is neither a dict nor a config.
    """

    model_type = "siglip_llama"
    attribute_map = {"image_token_id": "image_token_index"}
    keys_to_ignore_at_inference = list(NO_PREDICTIONS)
    sub_configs_defaults = {"vision_config": MllamaVisionConfig, "text_config": MllamaTextConfig}

    vision_config: dict | PretrainedConfig | None = None
    text_config: dict | PretrainedConfig | None = None
    ignore_index: int = -100
    image_token_index: int | None = None
    projector: str = "mlp"
    projection_dim: int | None = None
    vision_feature: str = "last"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    fusion: str = "merge"
    num_image_tokens: int | None = None
    image_pooling: str | None = None
    cross_attention_every: int | None = None

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        ignore_index: int = -100,
        image_token_index: int | None = None,
        vocab_size: int | None = None,
        projection_dim: int | None = None,
        hidden_size: int | None = None,
        pad_token_index: int | None = None,
        vision_feature: str = "last",
        projector_hidden_act: str = "gelu",
        multimodal_projector_bias: bool = True,
        projector: str = "mlp",
        fusion: str = "merge",
        num_image_tokens: int | None = None,
        image_pooling: str | None = None,
        cross_attention_every: int | None = None,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        own = {
            name: value for name, value in locals().items() if name in FAMILY.defaults | FOR_TEXT
        }
        given = kwargs | own
        kind = given.setdefault("model_type", self.model_type)
        if kind != self.model_type:
            raise ValueError(f"{owner}: model_type must be {self.model_type!r}, got {kind!r}")
        check_names(owner, type(self), [name for name in kwargs if name != "model_type"])
        check_common(owner, kwargs)
        if kwargs.get("image_token_id") is not None:
            del given["image_token_index"]
        parts = {name: _as_dict(name, given[name]) for name in FAMILY.parts}
        config = FAMILY.from_json(given | parts)
        FAMILY.read(config)
        config["vision_config"] = MllamaVisionConfig(**config["vision_config"])
        config["text_config"] = MllamaTextConfig(**config["text_config"])
        del config["model_type"]
        construct(owner, super().__init__, config)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', called by `from_pretrained`. Reads every folder that the package
        supports, LLaVA's included.
        """
        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        content = harmless(content)
        if family_of(content).name == "llava":
            content = siglip_llama.from_llava(content)
        return content, unused

    @property
    def vocab_size(self) -> int:
        """The decoder's vocabulary size."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """The decoder's width."""
        return self.text_config.hidden_size

    @property
    def pad_token_index(self) -> int | None:
        """The decoder's padding id."""
        return self.text_config.pad_token_id

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is tied to the embedding; stored in the decoder's config."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    @property
    def use_cache(self) -> bool:
        """Whether a forward pass outside training returns a cache by default; stored in the
        decoder's config.
        """
        return self.text_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.text_config.use_cache = value


AutoConfig.register(MllamaConfig.model_type, MllamaConfig)
