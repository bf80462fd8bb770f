"""A model without its head, `model.base_model`, as libraries around transformers expect it."""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mllama.hf.compat import DecoderOutput

_HEAD = "lm_head"
_ATTRIBUTES = "_backbone"


class Backbone(nn.Module):
    """Encoder, projector, fusion and decoder of a model. Its children are the model's own modules,
    and its forward is the model's.

    The model keeps the attributes of its backbone (hooks, say), and a backbone keeps its model. So
    neither refers to the other and back, and the memory of a deleted model is free at once.

    Args:
        owner: the model. It is not a child of this module.
        headless: the class's forward, which returns `DecoderOutput` if `logits_to_keep` is None.
            A subclass's forward may return something else.
    """

    __slots__ = ("owner",)  # beside the attributes
    _tp_plan = _pp_plan = None  # attributes that transformers reads from base models

    def __init__(self, owner: PreTrainedModel, headless: Callable[..., Any]):
        object.__setattr__(self, "owner", owner)
        if _ATTRIBUTES in owner.__dict__:
            object.__setattr__(self, "__dict__", owner.__dict__[_ATTRIBUTES])
        else:
            super().__init__()
            owner.__dict__[_ATTRIBUTES] = self.__dict__
        self.headless = headless

    def follow(self) -> "Backbone":
        """Return this module with the model's current children: wrappers (FSDP, torch.compile)
        replace some.
        """
        children = {name: child for name, child in self.owner.named_children() if name != _HEAD}
        if children != self._modules:
            self._modules.clear()
            self._modules.update(children)
        self.training = self.owner.training
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's, but a child that is set or replaced here is the model's."""
        if isinstance(value, nn.Module):
            setattr(self.owner, name, value)
            self.follow()
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            delattr(self.owner, name)
            self.follow()
        else:
            super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As torch's, to the model."""
        self.owner.add_module(name, module)
        self.follow()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "owner", state.pop("owner"))
        super().__setstate__(state)

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


# By the model's id, which is its own for as long as its backbone keeps it.
_LIVING: WeakValueDictionary[int, Backbone] = WeakValueDictionary()


def backbone_of(model: PreTrainedModel, headless: Callable[..., Any]) -> Backbone:
    """The backbone of a model, with the model's current children: the one that is in use, if one
    is. The arguments are `Backbone`'s.
    """
    if torch.compiler.is_compiling():  # which cannot look up what is in use
        return Backbone(model, headless)
    backbone = _LIVING.get(id(model))
    if backbone is None:
        backbone = _LIVING[id(model)] = Backbone(model, headless)
    return backbone.follow()
