"""Configurations of a SigLIP + Llama model as transformers' config objects. What they may say is
checked by their family; these classes collect it.
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

# Fields of the models' outputs that are no predictions: Trainer's evaluation would keep them all
# for compute_metrics.
NO_PREDICTIONS = (
    "cache",
    "past_key_values",
    "image_hidden_states",
    "image_attentions",
    "num_trained_tokens",
)

# What older scripts call fields.
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
        ValueError: a size that is not a positive integer, or sizes that do not go together; the
            text names the field.
    """

    def __init__(self, **kwargs):
        given = _settled("vision_config", type(self), kwargs, VISION) | {"vision_use_head": False}
        vision_spec(given)
        construct("vision_config", super().__init__, given)


class MllamaTextConfig(LlamaConfig):
    """The decoder's configuration: Llama's, and what other decoders have beyond it.

    Attributes:
        num_image_tokens: features of an image; set by the config of the whole.
        norm_offset: added to the norms' weights (Gemma: 1).
        embedding_scale: factor on looked-up embeddings (Gemma: the root of hidden_size); None is 1.
        extra_embeddings: rows of the embedding matrix beyond the vocabulary, which has no logits
            for them (Llama-3.2-Vision: 8).
        cross_attention_layers: must be None; `MllamaConfig.cross_attention_every` places layers
            that attend to images.

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not go together; the
            text names the field.
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
    """The arguments of a part's config with its defaults, in one spelling."""
    given = dict(given)
    found = given.pop("model_type", kind.model_type)
    if found != kind.model_type:
        raise ValueError(f"{owner}: model_type must be {kind.model_type!r}, got {found!r}")
    check_names(owner, kind, given)
    for name in _NO_FIELDS.keys() & given.keys():  # transformers would take it and pass it over
        raise ValueError(f"{owner}: {name} is no field; {_NO_FIELDS[name]} is")
    check_common(owner, given)
    settled = complete(owner, given, defaults)
    settled.pop("model_type")
    return settled


def _as_dict(name: str, given: Any) -> Config | None:
    """What a part was given as, as a dict."""
    if isinstance(given, PretrainedConfig):
        return config_fields(given)
    if not isinstance(given, (dict, type(None))):
        raise TypeError(
            f"{name} must be a dict, a config object or None, got {type(given).__name__}"
        )
    return given


class MllamaConfig(PretrainedConfig):
    """Configuration of a SigLIP encoder, a projector, and a Llama decoder that sees what they give
    in one of three ways.

    Args:
        vision_config: dict or config of the SigLIP encoder (`MllamaVisionConfig` says which names
            are taken). None: SigLIP-base's sizes.
        text_config: dict or config of the Llama decoder (`MllamaTextConfig` says which names are
            taken). None: Llama's defaults.
        ignore_index: label that is not trained.
        image_token_index: id of the `<image>` placeholder. None: with "merge" the model finds it,
            as the id standing in runs of a multiple of `text_config.num_image_tokens`; else there
            is none. It may lie outside the vocabulary: it is never looked up, save with
            "cross_attention", which has no use for it.
        vocab_size, hidden_size, pad_token_index: taken for the decoder where `text_config` itself
            does not say.
        projector: "mlp", two layers with an activation between them, or "linear", one from the
            encoder's width to the decoder's.
        projection_dim: width between the layers of an "mlp"; the decoder's width by default, and
            always with "linear".
        vision_feature: "last" takes the encoder's output after its final layer norm, "pre_norm"
            before it, as LLaVA's layer -1 does.
        projector_hidden_act: activation between the layers of an "mlp", a name transformers knows.
        multimodal_projector_bias: whether the projector's layers have biases.
        fusion: how the decoder sees images. "merge": every patch is a position of the text, where
            a placeholder stands. "prepend": patches are pooled to a few positions, which stand
            before the text. "cross_attention": gated layers, added to the decoder's own, in which
            text attends to patches; with their gates at zero, as they start, the text model is what
            it was.
        num_image_tokens: with "prepend", what a image's patches are pooled to: 1 to all of them,
            which is the default.
        image_pooling: with "prepend", "average" (the default; `torch.nn.AdaptiveAvgPool1d` over
            patches) or "learned" (a matrix over them).
        cross_attention_every: with "cross_attention", a layer is added after every so many of
            `text_config.num_hidden_layers`; 4, or all of a shorter decoder's, by default.

    Attributes:
        text_config.num_image_tokens: features of a image, and placeholders where it has some:
            `num_image_tokens`, or where nothing is pooled `(image_size // patch_size) ** 2`. Set
            here.

    Raises:
        ValueError: a size or a choice that cannot be; the text names the field.
        TypeError: a sub-config that is neither dict nor config.
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
        """As transformers', which `from_pretrained` asks; takes every folder the package reads,
        LLaVA's too.
        """
        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        content = harmless(content)
        if family_of(content).name == "llava":
            content = siglip_llama.from_llava(content)
        return content, unused

    @property
    def vocab_size(self) -> int:
        """The decoder's vocabulary."""
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
        """Whether the output head is the embedding matrix; the decoder's own setting."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    @property
    def use_cache(self) -> bool:
        """Whether a forward pass outside training returns a cache unasked; the decoder's own
        setting.
        """
        return self.text_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.text_config.use_cache = value


AutoConfig.register(MllamaConfig.model_type, MllamaConfig)
