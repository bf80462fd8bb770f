"""Specs that models are built from: frozen sizes and choices, checked by the family.

Field names are transformers' where it has the same field.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


class _Spec:
    """A dataclass that can be built from any object or mapping with its fields."""

    @classmethod
    def of(cls, config: Any, **given: Any) -> Self:
        """Copy the fields that `config` has; `given` overrides them, others keep their defaults."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if isinstance(config, Mapping):
            values = {name: config.get(name) for name in names} | given
        else:
            values = {name: getattr(config, name, None) for name in names} | given
        return cls(**{name: _frozen(value) for name, value in values.items() if value is not None})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class RopeSpec(_Spec):
    """Rotary frequencies: transformers' `rope_parameters`."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class LayerSpec(_Spec):
    """Options of one decoder layer.

    Attributes:
        attention: "self", or "cross" for attention to images.
        rope: rotary frequencies; cross-attention ignores them.
        window: number of positions visible to a query, its own included. Default: all before it.
        scale: factor on q k'. Default: head_dim**-0.5.
        softcap: scores become softcap * tanh(score / softcap).
        qk_norm: normalize the heads of q and k.
        post_norms: also normalize the outputs of attention and of the feed-forward block.
    """

    attention: str = "self"
    rope: RopeSpec = RopeSpec()
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qk_norm: bool = False
    post_norms: bool = False


def uniform_layers(
    count: int, rope: Mapping[str, Any], cross: Collection[int] = ()
) -> tuple[LayerSpec, ...]:
    """`count` equal layers, except that those at the indices `cross` attend to images.

    Args:
        count: number of layers.
        rope: `rope_parameters`.
        cross: indices of the cross-attention layers.
    """
    shared = RopeSpec.of(rope)
    own, crossing = LayerSpec("self", shared), LayerSpec("cross", shared)
    return tuple(crossing if index in cross else own for index in range(count))


@dataclass(frozen=True)
class TextSpec(_Spec):
    """A decoder.

    Attributes:
        layers: one spec per layer; the fields here are shared by all.
        norm_offset: added to the norms' weights (Gemma: 1).
        embedding_scale: factor on the embeddings (Gemma: sqrt(hidden_size)). Default: 1.
        extra_embeddings: rows of the embedding matrix beyond the vocabulary, which have no logits
            (Llama-3.2-Vision: 8).
        final_logit_softcapping: logits become c * tanh(logits / c); applied by the head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    norm_offset: float = 0.0
    embedding_scale: float | None = None
    extra_embeddings: int = 0
    final_logit_softcapping: float | None = None

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the cross-attention layers."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.attention == "cross")


def count_patches(vision: Any) -> int:
    """Patches of a square image, or of a tile, of the sizes of an encoder's spec or config."""
    return (vision.image_size // vision.patch_size) ** 2


@dataclass(frozen=True)
class VisionSpec(_Spec):
    """A SigLIP or CLIP encoder.

    Attributes:
        vision_use_head: add SigLIP's pooling head; for a vision model alone.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    vision_use_head: bool = False


@dataclass(frozen=True)
class TiledVisionSpec(_Spec):
    """Llama-3.2-Vision's encoder of tiled images."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    max_num_tiles: int
    vision_output_dim: int
    intermediate_layers_indices: tuple[int, ...]
    supported_aspect_ratios: tuple[tuple[int, int], ...]
    hidden_act: str = "gelu"
    norm_eps: float = 1e-5

    @property
    def max_aspect_ratio_id(self) -> int:
        """The largest id: 1 + the index in `supported_aspect_ratios`; id 0 means no image."""
        return len(self.supported_aspect_ratios)


@dataclass(frozen=True)
class ModelSpec:
    """The spec of a model: encoder x projector x fusion x decoder.

    Attributes:
        text: the decoder; None for a vision model alone.
        encoder: "siglip", "clip", "tiled", or None for a model without images.
        vision: the encoder's sizes.
        feature_layers: indices of the encoder's states to read, in (embeddings, each layer's
            output ...); several are concatenated. Default: the output of the final norm.
        skip_first: leave out the first feature of an image (CLIP's class token).
        selects_features: whether a call may override feature_layers and skip_first.
        projector: "mlp" or "linear".
        projector_sizes: widths of its input, of the hidden layer of an "mlp", and of its output.
        projector_act: activation between the layers of an "mlp".
        projector_bias: whether its layers have biases.
        fusion: "merge" writes features at the placeholders. "prepend" does the same, or puts them
            before a text without placeholders. With "cross_attention", layers of the decoder
            attend to them.
        pooling: "average" or "learned", over an image's patches before the projector; or None.
        tokens_per_image: features and placeholders of an image; 0 for tiled images.
        bidirectional_prefix: prompts attend in both directions, as `token_type_ids` mark
            (PaliGemma).
        image_token_index: id of the placeholder. None: it is found by its runs, or there is none.
        ignore_index: label that is not trained.
    """

    text: Any  # TextSpec or None
    encoder: str | None = None
    vision: Any = None  # VisionSpec or TiledVisionSpec
    feature_layers: tuple[int, ...] | None = None
    skip_first: bool = False
    selects_features: bool = False
    projector: str | None = None
    projector_sizes: tuple[int, int, int] = (0, 0, 0)
    projector_act: str = "gelu"
    projector_bias: bool = True
    fusion: str | None = None
    pooling: str | None = None
    tokens_per_image: int = 0
    bidirectional_prefix: bool = False
    image_token_index: int | None = None
    ignore_index: int = -100

    @property
    def has_tiles(self) -> bool:
        """Whether images are tiled."""
        return isinstance(self.vision, TiledVisionSpec)

    @property
    def takes_other_sizes(self) -> bool:
        """Whether images may have another size, and so another number of features."""
        fixed = self.pooling == "learned" or bool(self.text and self.text.cross_attention_layers)
        return isinstance(self.vision, VisionSpec) and not fixed
