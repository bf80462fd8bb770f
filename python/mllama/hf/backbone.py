"""A model without its head, as the libraries around transformers ask for it: `model.base_model`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mllama.hf.compat import DecoderOutput

_HEAD = "lm_head"


class Backbone(nn.Module):
    """Tower, projector, fusion and decoder of a model. It holds the model's own modules, and
    computes by the model's forward.

    Args:
        owner: the model. It is no child of this module.
        headless: its class's forward, which returns `DecoderOutput` where `logits_to_keep` is None.
            Not that of a subclass, which may return something else.
    """

    _tp_plan = _pp_plan = None  # transformers asks its base models for them

    def __init__(self, owner: PreTrainedModel, headless: Callable[..., Any]):
        super().__init__()
        self.__dict__["owner"] = owner
        self.headless = headless

    def follow(self) -> "Backbone":
        """This module, with the children that the model has now: wrappers (FSDP, torch.compile)
        take the place of some.
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
        """The model's."""
        return self.owner.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.owner.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.owner.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's embedding matrix."""
        return self.owner.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding matrix in place."""
        self.owner.set_input_embeddings(value)

    def get_image_features(self, *args, **kwargs) -> torch.Tensor:
        """As the model's."""
        return self.owner.get_image_features(*args, **kwargs)

    def forward(self, *args, **kwargs) -> DecoderOutput | tuple:
        """As the model's forward, without labels: last_hidden_state [B, T, hidden], the decoder's
        after its final norm, in place of logits.

        Raises:
            TypeError, ValueError: as the model's forward.
        """
        return self.headless(self.owner, *args, **kwargs, logits_to_keep=None)
