"""Configurations of a SigLIP + Llama model: Hugging Face's names, the short names people also type,
and a check of every size.

`attribute_map` alone lets a short name be read and set, but a short name given to the constructor
would arrive after Hugging Face has derived the head size from its own default; so both names are
settled before the parent's constructor runs.
"""

import copy
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, SiglipVisionConfig

from mllama.config.checks import (
    CROSS_ATTENTION_EVERY,
    FUSIONS,
    HEAD_DIM_MAX,
    HEAD_DIM_MIN,
    POOLINGS,
    PROJECTORS,
    ROPE_TYPES,
    SIZE_MAX,
    TEXT_ACTIVATIONS,
    VISION_FEATURES,
    check_choice,
    check_common,
    check_names,
    check_number,
    check_size,
)
from mllama.nn.activation import ACTIVATIONS

SHORT_NAMES = {
    "emb_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
}
TEXT_SHORT_NAMES = SHORT_NAMES | {
    "n_kv_groups": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}

# Fields of the models' outputs that are no predictions: Trainer's evaluation would keep them all
# for compute_metrics.
NO_PREDICTIONS = (
    "cache",
    "past_key_values",
    "image_hidden_states",
    "image_attentions",
    "num_trained_tokens",
)
_SIZES = tuple(SHORT_NAMES.values())
_VISION_SIZES = (*_SIZES, "num_channels", "image_size", "patch_size")
_TEXT_SIZES = (*_SIZES, "num_key_value_heads", "max_position_embeddings", "head_dim", "vocab_size")


def _translate(owner: str, names: dict[str, str], given: dict[str, Any]) -> dict[str, Any]:
    """Put Hugging Face's name in the place of every short one. Two names with two values are an
    error, save the context's length.
    """
    settled = {name: value for name, value in given.items() if name not in names}
    for short, name in names.items():
        if given.get(short) is None:
            continue
        value, other = given[short], given.get(name)
        if other is None:
            settled[name] = value
        elif short == "context_length":
            check_size(owner, short, value)
            check_size(owner, name, other)
            settled[name] = max(value, other)
        elif other != value:
            raise ValueError(
                f"{owner}: {short} = {value!r} and {name} = {other!r} are two names of one field; give one, or the same value"
            )
    return settled


def _check_type(owner: str, given: dict[str, Any], model_type: str) -> None:
    found = given.pop("model_type", model_type)
    if found != model_type:
        raise ValueError(f"{owner}: model_type must be {model_type!r}, got {found!r}")


class MllamaVisionConfig(SiglipVisionConfig):
    """SigLIP's vision configuration. Takes Hugging Face's names and `emb_dim`, `hidden_dim`,
    `n_heads`, `n_layers`.

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not go together; the
            text names the field.
    """

    attribute_map = dict(SHORT_NAMES)

    def __init__(self, **kwargs):
        owner = "vision_config"
        _check_type(owner, kwargs, self.model_type)
        check_names(owner, type(self), kwargs)
        given = _translate(owner, SHORT_NAMES, kwargs)
        given["vision_use_head"] = False  # the pooling head has no part in a vision-language model
        _check_sizes(owner, _VISION_SIZES, given, SiglipVisionConfig)
        _construct(super().__init__, owner, given)
        check_number(owner, "layer_norm_eps", self.layer_norm_eps)
        check_choice(owner, "hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"{owner}: attention_dropout must be a number from 0 to below 1, got {self.attention_dropout!r}"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"{owner}: patch_size {self.patch_size} is larger than image_size {self.image_size}"
            )
        check_size(owner, "patches of an image_size", (self.image_size // self.patch_size) ** 2)


class MllamaTextConfig(LlamaConfig):
    """The decoder's configuration: Llama's, and what Gemma and Llama-3.2-Vision have beyond it.
    Takes Hugging Face's names and the short
    ones: `emb_dim`, `hidden_dim`, `n_heads`, `n_layers`, `n_kv_groups`, `context_length`,
    `rope_base`, `rope_freq` (a dict of Llama 3's frequency scaling, with
    `original_context_length`). Both spellings can be read and set afterwards. Of `context_length`
    and `max_position_embeddings` the larger holds.

    Attributes:
        norm_offset: added to the norms' weights (Gemma: 1).
        embedding_scale: factor on looked-up embeddings (Gemma: the root of hidden_size); None is 1.
        extra_embeddings: rows of the embedding matrix beyond the vocabulary, which has no logits
            for them (Llama-3.2-Vision: 8).
        cross_attention_layers: places of layers that attend to pictures instead of text
            (Llama-3.2-Vision).

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not go together; the
            text names the field.
    """

    attribute_map = dict(TEXT_SHORT_NAMES)

    num_image_tokens: int | None = None
    norm_offset: float = 0.0
    embedding_scale: float | None = None
    extra_embeddings: int = 0
    cross_attention_layers: list[int] | None = None

    def __init__(self, **kwargs):
        owner = "text_config"
        _check_type(owner, kwargs, self.model_type)
        check_names(owner, type(self), kwargs)
        given = _rope_names(owner, _translate(owner, TEXT_SHORT_NAMES, kwargs))
        _check_sizes(owner, _TEXT_SIZES, given, LlamaConfig)
        _construct(super().__init__, owner, given)
        check_number(owner, "rms_norm_eps", self.rms_norm_eps)
        if self.num_attention_heads % self.num_key_value_heads:
            heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(
                f"{owner}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads} (n_kv_groups)"
            )
        check_choice(owner, "hidden_act", self.hidden_act, TEXT_ACTIVATIONS)
        check_choice(owner, "attention_dropout", self.attention_dropout, (0,))
        check_choice(owner, "norm_offset", self.norm_offset, (0, 1))
        if self.embedding_scale is not None:
            check_number(owner, "embedding_scale", self.embedding_scale)
        check_size(owner, "extra_embeddings", self.extra_embeddings, minimum=0)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            given_id = getattr(self, name)
            for token in given_id if isinstance(given_id, list) else [given_id]:
                if token is not None and (
                    isinstance(token, bool) or not isinstance(token, int) or abs(token) > SIZE_MAX
                ):
                    raise ValueError(
                        f"{owner}: {name} must be an id, several or None, got {given_id!r}"
                    )
        crossed = self.cross_attention_layers or []
        if any(
            isinstance(index, bool)
            or not isinstance(index, int)
            or not 0 <= index < self.num_hidden_layers
            for index in crossed
        ):
            raise ValueError(
                f"{owner}: cross_attention_layers must be layers of 0 to {self.num_hidden_layers - 1}, got {crossed!r}"
            )
        if 0 in crossed:  # caches tell by their first layer how many tokens they hold
            raise ValueError(
                f"{owner}: cross_attention_layers must not begin with layer 0, got {crossed!r}"
            )

    @property
    def rope_base(self) -> float:
        """The base of the rotary frequencies: `rope_parameters["rope_theta"]`."""
        return self.rope_parameters["rope_theta"]

    @rope_base.setter
    def rope_base(self, value: float) -> None:
        check_number("text_config", "rope_base", value)
        self.rope_parameters = self.rope_parameters | {"rope_theta": value}

    @property
    def rope_freq(self) -> dict[str, float] | None:
        """Llama 3's frequency scaling with the short names, None where the frequencies are not
        scaled that way.
        """
        if self.rope_parameters["rope_type"] != "llama3":
            return None
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return {name: self.rope_parameters[name] for name in names} | {
            "original_context_length": self.rope_parameters["original_max_position_embeddings"]
        }

    @rope_freq.setter
    def rope_freq(self, value: dict[str, float] | None) -> None:
        parameters = _rope_names("text_config", {"rope_base": self.rope_base, "rope_freq": value})[
            "rope_parameters"
        ]
        if value is not None:  # as transformers fills it when the config is made
            parameters.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        self.rope_parameters = {"rope_type": "default"} | parameters


def _rope_names(owner: str, given: dict[str, Any]) -> dict[str, Any]:
    """Put `rope_base`, `rope_freq`, and Hugging Face's older `rope_theta` and `rope_scaling`, into
    one `rope_parameters`.
    """
    given = dict(given)
    base, frequencies = given.pop("rope_base", None), given.pop("rope_freq", None)
    theta, scaling, parameters = (
        given.pop(name, None) for name in ("rope_theta", "rope_scaling", "rope_parameters")
    )
    for name, value in (
        ("rope_freq", frequencies),
        ("rope_scaling", scaling),
        ("rope_parameters", parameters),
    ):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{owner}: {name} must be a dict or None, got {value!r}")
    merged = dict(parameters or scaling or {})
    if frequencies is not None:
        if merged.get("rope_type", merged.get("type", "default")) != "default":
            raise ValueError(
                f"{owner}: rope_freq and rope_scaling both scale the rotary frequencies; give one"
            )
        merged |= frequencies
        merged["rope_type"] = "llama3"
        if "original_context_length" in merged:
            merged["original_max_position_embeddings"] = merged.pop("original_context_length")
    if "type" in merged:
        merged.setdefault("rope_type", merged.pop("type"))
    thetas = {
        name: value
        for name, value in (("rope_base", base), ("rope_theta", theta))
        if value is not None
    }
    thetas |= (
        {"rope_parameters": merged["rope_theta"]} if merged.get("rope_theta") is not None else {}
    )
    for name, value in thetas.items():
        check_number(owner, f"{name} (rope_theta)" if name != "rope_theta" else name, value)
    if len(set(thetas.values())) > 1:
        raise ValueError(f"{owner}: the base of the rotary frequencies is given twice: {thetas}")
    check_choice(
        owner, "rope_parameters['rope_type']", merged.get("rope_type", "default"), ROPE_TYPES
    )
    check_choice(
        owner,
        "rope_parameters['partial_rotary_factor']",
        merged.get("partial_rotary_factor"),
        (None, 1),
    )
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "linear": ("factor",)}
    for name in needed.get(merged.get("rope_type"), ()):
        check_number(owner, f"rope_parameters[{name!r}]", merged.get(name))
    if merged.get("rope_type") == "llama3":
        low, high = merged["low_freq_factor"], merged["high_freq_factor"]
        if not low < high:  # the frequencies between them are blended by their distance
            raise ValueError(
                f"{owner}: rope_parameters: high_freq_factor {high!r} must be above low_freq_factor {low!r}"
            )
        if merged.get("original_max_position_embeddings") is not None:
            check_size(
                owner,
                "rope_parameters['original_max_position_embeddings']",
                merged["original_max_position_embeddings"],
            )
    return given | {
        "rope_parameters": merged | {"rope_theta": next(iter(thetas.values()), 10000.0)}
    }


def _check_sizes(
    owner: str, names: tuple[str, ...], given: dict[str, Any], parent: type[PretrainedConfig]
) -> None:
    """Before the parent's constructor divides by them: every size given, and what a head will be."""
    for name in names:
        if given.get(name) is not None:
            check_size(owner, name, given[name])
    hidden_size, heads = (
        given.get(name) or getattr(parent, name) for name in ("hidden_size", "num_attention_heads")
    )
    if hidden_size % heads:
        raise ValueError(
            f"{owner}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    head_dim = given.get("head_dim") or hidden_size // heads
    if not HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX:
        raise ValueError(
            f"{owner}: head_dim (by default hidden_size / num_attention_heads, here {hidden_size} / {heads}) must be "
            f"{HEAD_DIM_MIN} to {HEAD_DIM_MAX}, got {head_dim}"
        )


def _construct(constructor, owner: str, given: dict[str, Any]) -> None:
    """Run the parent's constructor; the errors it has for values that cannot be become a
    ValueError.
    """
    check_common(owner, given)
    try:
        constructor(**given)
    except (StrictDataclassError, AttributeError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{owner}: {' '.join(str(error).split())}") from error


def _sub_config(
    name: str, kind: type[PretrainedConfig], given: Any, **defaults: Any
) -> PretrainedConfig:
    """A config of the given kind from None, a dict or a config object; `defaults` fill what it does
    not say.

    Always a new object: a model writes into its own, and the caller may give one to several.
    """
    if given is None:
        given = {}
    elif isinstance(given, kind):
        return copy.deepcopy(given)
    elif isinstance(given, PretrainedConfig):
        given = given.to_dict()
    elif not isinstance(given, dict):
        raise TypeError(
            f"{name} must be a dict, a config object or None, got {type(given).__name__}"
        )
    check_names(name, kind, {key: value for key, value in given.items() if key != "model_type"})
    given = _translate(name, kind.attribute_map, given)
    missing = {
        key: value
        for key, value in defaults.items()
        if value is not None and given.get(key) is None
    }
    return kind(**(given | missing))


class MllamaConfig(PretrainedConfig):
    """Configuration of a SigLIP tower, a projector, and a Llama decoder that sees what they give in
    one of three ways.

    Args:
        vision_config: dict or config of the SigLIP tower (`MllamaVisionConfig` says which names are
            taken). None: SigLIP-base's sizes.
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
            tower's width to the decoder's.
        projection_dim: width between the layers of an "mlp"; the decoder's width by default, and
            always with "linear".
        vision_feature: "last" takes the tower's output after its final layer norm, "pre_norm"
            before it, as LLaVA's layer -1 does.
        projector_hidden_act: activation between the layers of an "mlp", a name transformers knows.
        multimodal_projector_bias: whether the projector's layers have biases.
        fusion: how the decoder sees pictures. "merge": every patch is a position of the text, where
            a placeholder stands. "prepend": patches are pooled to a few positions, which stand
            before the text. "cross_attention": gated layers, added to the decoder's own, in which
            text attends to patches; with their gates at zero, as they start, the text model is what
            it was.
        num_image_tokens: with "prepend", what a picture's patches are pooled to: 1 to all of them,
            which is the default.
        image_pooling: with "prepend", "average" (the default; `torch.nn.AdaptiveAvgPool1d` over
            patches) or "learned" (a matrix over them).
        cross_attention_every: with "cross_attention", a layer is added after every so many of
            `text_config.num_hidden_layers`; 4, or all of a shorter decoder's, by default.

    Attributes:
        text_config.num_image_tokens: features of a picture, and placeholders where it has some:
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
        _check_type(owner, kwargs, self.model_type)
        check_names(owner, type(self), kwargs)
        if kwargs.get("image_token_id") is not None:
            image_token_index = kwargs.pop("image_token_id")
        tied, use_cache = kwargs.pop("tie_word_embeddings", None), kwargs.pop("use_cache", None)

        self.vision_config = _sub_config("vision_config", MllamaVisionConfig, vision_config)
        self.text_config = _sub_config(
            "text_config",
            MllamaTextConfig,
            text_config,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            pad_token_id=pad_token_index,
        )
        if tied:  # as LLaVA reads it: True here or there ties
            self.text_config.tie_word_embeddings = True
        if use_cache is not None:
            self.text_config.use_cache = use_cache
        self._set_fusion(owner, fusion, num_image_tokens, image_pooling, cross_attention_every)

        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"{owner}: ignore_index must be an integer, got {ignore_index!r}")
        if image_token_index is not None:
            check_size(owner, "image_token_index", image_token_index, minimum=0)
        self.ignore_index = ignore_index
        self.image_token_index = image_token_index
        self.projection_dim = (
            self.text_config.hidden_size if projection_dim is None else projection_dim
        )
        check_size(owner, "projection_dim", self.projection_dim)
        check_choice(owner, "projector", projector, PROJECTORS)
        if projector == "linear" and self.projection_dim != self.text_config.hidden_size:
            raise ValueError(
                f"{owner}: projection_dim must be the decoder's hidden_size {self.text_config.hidden_size} or None with "
                f"projector='linear', which is one layer; got {self.projection_dim}"
            )
        check_choice(owner, "vision_feature", vision_feature, VISION_FEATURES)
        check_choice(owner, "projector_hidden_act", projector_hidden_act, tuple(ACTIVATIONS))
        check_choice(owner, "multimodal_projector_bias", multimodal_projector_bias, (True, False))
        self.projector = projector
        self.vision_feature = vision_feature
        self.projector_hidden_act = projector_hidden_act
        self.multimodal_projector_bias = multimodal_projector_bias
        _construct(super().__init__, owner, kwargs)

    def _set_fusion(
        self, owner: str, fusion: str, tokens: int | None, pooling: str | None, every: int | None
    ) -> None:
        check_choice(owner, "fusion", fusion, FUSIONS)
        of_one = (("num_image_tokens", tokens, "prepend"), ("image_pooling", pooling, "prepend"))
        for name, value, wanted in (*of_one, ("cross_attention_every", every, "cross_attention")):
            if value is not None and fusion != wanted:
                raise ValueError(
                    f"{owner}: {name} is for fusion={wanted!r}; with {fusion!r} it must be None, got {value!r}"
                )
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        layers = self.text_config.num_hidden_layers
        if fusion == "prepend":
            tokens, pooling = (
                patches if tokens is None else tokens,
                "average" if pooling is None else pooling,
            )
            check_size(owner, "num_image_tokens", tokens)
            if tokens > patches:
                raise ValueError(
                    f"{owner}: num_image_tokens must be at most the {patches} patches of a picture, got {tokens}"
                )
            check_choice(owner, "image_pooling", pooling, POOLINGS)
        if fusion == "cross_attention":
            every = min(CROSS_ATTENTION_EVERY, layers) if every is None else every
            check_size(owner, "cross_attention_every", every)
            if every > layers:
                raise ValueError(
                    f"{owner}: cross_attention_every must be at most the text model's {layers} layers, got {every}"
                )
        self.fusion, self.num_image_tokens, self.image_pooling, self.cross_attention_every = (
            fusion,
            tokens,
            pooling,
            every,
        )
        self.text_config.num_image_tokens = patches if tokens is None else tokens

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', which `from_pretrained` asks; takes every folder the package reads,
        LLaVA's too.
        """
        from mllama.checkpoints import (
            config_arguments,
        )  # which file says what is the checkpoints' business

        content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return config_arguments(content), unused

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
