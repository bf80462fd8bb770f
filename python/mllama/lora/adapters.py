"""The content of adapter files, and its names."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from mllama.lora import peft
from mllama.lora.adapter import Options, parts_of
from mllama.lora.layer import Linear_LORA, lora_layers
from mllama.nn.wrappers import plain_key, plain_name, unwrapped

_KEY = re.compile(r"((?P<name>.*)\.)?(?P<part>lora_[ab]|lora_magnitude)\.weight")


@dataclass
class Adapters:
    """The content of an adapter file.

    Attributes:
        tensors: NAME.lora_a.weight and NAME.lora_b.weight of every layer, with DoRA also
            NAME.lora_magnitude.weight.
        alphas: by layer name; empty if the file has none.
        trained: other parameters, by name.
        dropout: of the layers, in training.
        frozen: names in `trained` that were not trained: embedding and head matrices, which PEFT
            writes next to adapters.
        format: of the file: "mllama", "peft" or "pth".
        base: the model that the file names.
    """

    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float]
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()
    format: str = "mllama"
    base: str | None = None

    def layers(self) -> set[str]:
        """Names of the layers that the tensors are parts of."""
        found = map(_KEY.fullmatch, self.tensors)
        return {parts["name"] or "" for parts in found if parts}

    def options(self) -> dict[str, Options]:
        """What each layer's adapter is made with.

        Raises:
            ValueError: a layer lacks a part, its rank does not fit, or the file has no alphas.
        """
        found = {}
        layers = {
            parts["name"] or "": key
            for key in self.tensors
            if (parts := _KEY.fullmatch(key)) and parts["part"] == "lora_a"
        }
        for name, key in layers.items():
            down, up = self.tensors[key], self.tensors.get(adapter_key(name, "lora_b.weight"))
            if up is None or down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
                raise ValueError(f"{name} has no two matrices of one rank")
            if name not in self.alphas:
                raise ValueError(f"the file does not say which alpha {name} has")
            dora = adapter_key(name, "lora_magnitude.weight") in self.tensors
            found[name] = Options(down.shape[0], self.alphas[name], self.dropout, dora)
        return found


def adapter_key(name: str, part: str) -> str:
    """Key of a layer's part, such as "lora_a.weight"; the name of a lone layer is empty."""
    return f"{name}.{part}" if name else part


def plain_layers(model: nn.Module, adapter: str | None = None) -> dict[str, Linear_LORA]:
    """LoRA layers by name, without the parts that wrappers add to names; those that have an adapter
    of this name.
    """
    return {
        plain_name(model, name): layer
        for name, layer in lora_layers(model).items()
        if adapter is None or adapter in layer.adapters()
    }


def part_keys(layers: Mapping[str, Linear_LORA], adapter: str) -> dict[str, str]:
    """Keys in a file of an adapter -> keys in the model's state dict."""
    keys = {}
    for name, layer in layers.items():
        inside = "" if adapter == layer.name else f"inactive.{adapter}."
        for part in parts_of(layer.adapters()[adapter]):
            keys[adapter_key(name, part)] = adapter_key(name, inside + part)
    return keys


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by each of their names, without the parts that wrappers add."""
    return {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def own_adapters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's tensors under the model's own names, as a state dict of the adapters."""
    layers: dict[str, torch.Tensor] = {}
    trained: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = peft.own_key(key.removeprefix(peft.PREFIX))
        (layers if _KEY.fullmatch(name) else trained)[name] = tensor
    found = with_own_names(model, Adapters(layers, {}, trained))
    return found.tensors | found.trained


def with_own_names(model: nn.Module, found: Adapters) -> Adapters:
    """Rename the file's tensors to the model's own names."""
    split = {key: _KEY.fullmatch(key) for key in found.tensors}
    names = {*found.alphas, *(parts["name"] or "" for parts in split.values() if parts)}
    layers = _own_names(model, names)
    owners = _own_names(model, {name.rpartition(".")[0] for name in found.trained})

    def own_key(key: str) -> str:
        parts = split[key]
        if not parts:
            return key
        return adapter_key(layers[parts["name"] or ""], f"{parts['part']}.weight")

    def own_parameter(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        return f"{owners[owner]}.{leaf}"

    return Adapters(
        {own_key(key): tensor for key, tensor in found.tensors.items()},
        {layers[name]: alpha for name, alpha in found.alphas.items()},
        {own_parameter(name): tensor for name, tensor in found.trained.items()},
        found.dropout,
        frozenset(map(own_parameter, found.frozen)),
        found.format,
        found.base,
    )


def _own_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Names of modules in a file -> the model's own. Models translate names of weights."""
    known = {plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)}
    translate: Callable[[set[str]], dict[str, str]] = getattr(
        unwrapped(model), "own_names", lambda names: {}
    )
    plain = {name: name if name in known else plain_key(name) for name in names}
    named = translate({f"{name}.weight" for name in plain.values() if name not in known})
    return {
        name: named.get(f"{other}.weight", f"{other}.weight").removesuffix(".weight")
        for name, other in plain.items()
    }
