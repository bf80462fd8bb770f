"""`modeling_gemma`: PaliGemma and its decoder under the names of a from-scratch PaliGemma, on this
package's models.
"""

from dataclasses import replace

import torch
import transformers

from mllama.config.spec import ModelSpec
from mllama.dropin._arguments import hands_on
from mllama.dropin._cache import KVCache
from mllama.dropin._model import OlderModel
from mllama.dropin._output import OlderOutput
from mllama.hf.config_objects import compose

__all__ = [
    "GemmaConfig",
    "GemmaForCausalLM",
    "KVCache",
    "PaliGemmaConfig",
    "PaliGemmaForConditionalGeneration",
]


class GemmaConfig(transformers.GemmaConfig):
    """transformers' GemmaConfig, with its sizes required and in this order.

    Attributes:
        rope_theta: base of the rotary frequencies.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int = 256,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        pad_token_id: int | None = None,
        **kwargs,
    ):
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=rms_norm_eps,
            attention_bias=attention_bias,
            attention_dropout=attention_dropout,
            pad_token_id=pad_token_id,
            **{"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}} | kwargs,
        )

    @property
    def rope_theta(self) -> float:
        """The base of the rotary frequencies."""
        return self.rope_parameters["rope_theta"]


class PaliGemmaConfig(transformers.PaliGemmaConfig):
    """transformers' PaliGemmaConfig, its arguments in this order.

    Args:
        vision_config, text_config: dicts or configs. None: those of PaliGemma 3B.
        ignore_index: label that is not trained.
        image_token_index: id of `<image>`.
        vocab_size: of the whole; the decoder's is its own.
        projection_dim, hidden_size: the decoder's width.
        pad_token_id: padding id of a decoder that does not say its own.
    """

    def __init__(
        self,
        vision_config: dict | transformers.PretrainedConfig | None = None,
        text_config: dict | transformers.PretrainedConfig | None = None,
        ignore_index: int = -100,
        image_token_index: int = 256000,
        vocab_size: int = 257152,
        projection_dim: int = 2048,
        hidden_size: int = 2048,
        pad_token_id: int | None = None,
        **kwargs,
    ):
        if isinstance(vision_config, dict):  # the tower's pooling head has no part in the model
            vision_config = {"vision_use_head": False} | vision_config
        if isinstance(text_config, dict):
            text_config = {"pad_token_id": pad_token_id} | text_config
        elif isinstance(
            text_config, GemmaConfig
        ):  # transformers makes a part's class without arguments, to write what differs
            text_config = transformers.GemmaConfig(**text_config.to_dict())
        super().__init__(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=image_token_index,
            vocab_size=vocab_size,
            projection_dim=projection_dim,
            hidden_size=hidden_size,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        self.ignore_index = ignore_index


class GemmaForCausalLM(OlderModel):
    """A Gemma that goes on with text. The weights are random, the output head is the embedding
    matrix.

    Args:
        config: `GemmaConfig`, or transformers'.
    """


class PaliGemmaForConditionalGeneration(OlderModel):
    """Answers about pictures. The weights are random; the output head is the embedding matrix.

    Args:
        config: `PaliGemmaConfig`, or transformers'.
    """

    @staticmethod
    def make_spec(config: transformers.PaliGemmaConfig) -> ModelSpec:
        """As the package's; the label that is not trained is the config's."""
        spec = compose(config)
        return replace(spec, ignore_index=getattr(config, "ignore_index", spec.ignore_index))

    @hands_on(OlderModel.forward)
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        labels=None,
        kv_cache=None,
        **kwargs,
    ) -> OlderOutput | tuple:
        """As `OlderModel.forward`. A prompt, read while there is no cache or an empty one, is seen
        both ways, unless labels, `token_type_ids` or `prefix_length` say what is to be learnt or
        said.
        """
        said = (labels, kwargs.get("token_type_ids"), kwargs.get("prefix_length"))
        if input_ids is not None and all(given is None for given in said):
            kwargs["token_type_ids"] = torch.zeros_like(input_ids)
        return super().forward(input_ids, pixel_values, attention_mask, labels, kv_cache, **kwargs)
