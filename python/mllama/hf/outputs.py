"""Outputs of the transformers models."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllama.hf.compat import CacheOutput, DecoderOutput
from mllama.model.model import ModelOutput


@dataclass
class MllamaOutput(CacheOutput):
    """Output of the model, read as `output.logits`, `output["logits"]` or by index. Fields that are
    None are left out.

    Attributes:
        loss: float32 scalar, if labels were given.
        logits: [B, T, vocabulary], in the model's dtype; prepended visual tokens come
            first.
        cache: the key-value cache, if one was used; also read as `past_key_values`.
        hidden_states: the decoder's, layers + 1 of [B, T, hidden].
        attentions: the decoder's, one [B, heads, T, keys] float32 per layer.
        image_hidden_states: projected features [images, patches, hidden], as `get_image_features`
            returns them.
        image_attentions: the encoder's, one [images, heads, patches, patches] float32 per layer.
        num_trained_tokens: int64 scalar, number of labels in the loss, if labels were given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    image_attentions: tuple[torch.Tensor, ...] | None = None
    num_trained_tokens: torch.Tensor | None = None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling | None:
        """The encoder's part in the form of transformers 5.24: `image_hidden_states` as
        `pooler_output`, and `attentions`.
        """
        if self.image_hidden_states is None:
            return None
        return BaseModelOutputWithPooling(
            pooler_output=self.image_hidden_states, attentions=self.image_attentions
        )


def as_output(
    computed: ModelOutput, cache: Cache | None, headless: bool, return_dict: bool
) -> MllamaOutput | DecoderOutput | tuple:
    """Convert the output of `compute` to transformers' form."""
    output: MllamaOutput | DecoderOutput
    if headless:
        output = DecoderOutput(
            last_hidden_state=computed.last_hidden_state[:, computed.num_prefix_tokens :],
            cache=cache,
            hidden_states=computed.hidden_states,
            attentions=computed.attentions,  # type: ignore[arg-type]
        )
    else:
        output = MllamaOutput(
            loss=computed.loss,
            logits=computed.logits,
            cache=cache,
            hidden_states=computed.hidden_states,
            attentions=computed.attentions,  # type: ignore[arg-type]
            image_hidden_states=computed.image_features,
            image_attentions=computed.image_attentions,
            num_trained_tokens=computed.num_trained_tokens,
        )
    return output if return_dict else output.to_tuple()
