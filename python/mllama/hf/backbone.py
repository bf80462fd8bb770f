"""A model without its head, `model.base_model`, as libraries around transformers expect it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mllama.hf.compat import DecoderOutput

_HEAD = "lm_head"


class Backbone(nn.Module):
    """Encoder, projector, fusion and decoder of a model. Its children are the model's own modules,
    and its forward is the model's.

    Args:
        owner: the model. It is not a child of this module.
        headless: the class's forward, which returns `DecoderOutput` if `logits_to_keep` is None.
            A subclass's forward may return something else.
    """

    _tp_plan = _pp_plan = None  # attributes that transformers reads from base models

    def __init__(self, owner: PreTrainedModel, headless: Callable[..., Any]):
        super().__init__()
        self.__dict__["owner"] = owner
        self.headless = headless

    def follow(self) -> "Backbone":
        """Return this module with the model's current children: wrappers (FSDP, torch.compile)
        replace some.
        """
        if not torch.compiler.is_compiling():
            children = {name: child for name, child in self.owner.named_children() if name != _HEAD}
            if children != self._modules:
                self._modules.clear()
                self._modules.update(children)
            self.training = self.owner.training
        return self

    @property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return self.owner.config

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.owner.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.owner.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding."""
        return self.owner.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding."""
        self.owner.set_input_embeddings(value)

    def get_image_features(self, *args, **kwargs) -> torch.Tensor:
        """As the model's `get_image_features`."""
        return self.owner.get_image_features(*args, **kwargs)

    def forward(self, *args, **kwargs) -> DecoderOutput | tuple:
        """As the model's forward without labels, with last_hidden_state [B, T, hidden] (after the
        decoder's final norm) instead of logits.

        Raises:
            TypeError, ValueError: as the model's forward; labels are given.
        """
        if kwargs.get("labels") is not None:
            raise ValueError("labels must be None: the base model has no head; call the model")
        return self.headless(self.owner, *args, **kwargs, logits_to_keep=None)
