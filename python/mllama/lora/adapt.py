"""Give a model a new adapter: layers by scope, ranks by pattern, modules trained in full beside."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from mllama.checkpoints.files import listing
from mllama.lora.adapter import DEFAULT, Options, check_adapter, check_name, parts_of
from mllama.lora.adapters import plain_layers
from mllama.lora.convert import adaptable_layers, put_adapters, tied_layers
from mllama.lora.layer import Linear_LORA
from mllama.lora.named import lora_names
from mllama.lora.scopes import find_targets, ranked
from mllama.nn.wrappers import is_sharded, plain_name

_MODULES = {"vision": "vision_tower", "projector": "multi_modal_projector"}


@dataclass(frozen=True)
class Adapted:
    """What an adapter consists of. `str()` is the printed summary.

    Attributes:
        name: the adapter's.
        layers: the layers that have it, by plain dotted name.
        ranks: their ranks.
        trained_modules: names of modules that are trained in full beside it.
        num_parameters: of the adapter alone.
        num_trained: of these and the modules trained in full.
        num_total: of the whole model with them; packed weights do not count.
    """

    name: str
    layers: dict[str, Linear_LORA]
    ranks: dict[str, int]
    trained_modules: tuple[str, ...]
    num_parameters: int
    num_trained: int
    num_total: int

    @property
    def names(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self.layers)

    def __str__(self) -> str:
        share = 100 * self.num_trained / max(self.num_total, 1)
        kind = "DoRA" if any(each.lora_magnitude for each in self.layers.values()) else "LoRA"
        lines = [
            f"adapter {self.name!r} ({kind}): {len(self.layers)} layers, "
            f"{self.num_parameters:,} parameters; trained are {self.num_trained:,} of "
            f"{self.num_total:,} ({share:.2f} %)"
        ]
        groups: dict[tuple[str, int, float], list[str]] = {}
        for name, layer in self.layers.items():
            owner = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name.rpartition(".")[0])
            groups.setdefault((owner, layer.rank, float(layer.alpha)), []).append(name)
        for (owner, rank, alpha), names in groups.items():
            ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            where = f"{owner}: {ends}" if owner else ends
            lines.append(f"  {where} ({len(names)} layers, rank {rank}, alpha {alpha:g})")
        if self.trained_modules:
            lines.append(f"  in full: {', '.join(self.trained_modules)}")
        return "\n".join(lines)


def adapt(
    model: nn.Module,
    targets: str | Iterable[str] = ("attn", "mlp"),
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    ranks: Mapping[str, int] | None = None,
    rslora: bool = False,
    dora: bool = False,
    trained_modules: str | Iterable[str] = (),
    name: str = DEFAULT,
    alphas: Mapping[str, float] | None = None,
) -> Adapted:
    """Give a model a new adapter, which is then in use, and freeze everything else.

    The output does not change until the adapter is trained. Other adapters stay, frozen. Adapters
    are float32, also in 16-bit models and beside packed weights. What was adapted is printed to
    stderr and returned.

    Args:
        model: a model of any family, or another module.
        targets: which linear layers: scopes, ranges, regular expressions and ends of names, as
            `mllama.lora.scopes.find_targets` explains.
        rank, alpha, dropout: of the adapter, see `Linear_LORA`.
        ranks, alphas: other ranks and alphas by pattern, as PEFT's `rank_pattern` and
            `alpha_pattern`.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, 2023). The
            layers' `alpha` is the given one times sqrt(rank).
        dora: train magnitudes too (Liu et al., 2024).
        trained_modules: modules to train in full beside the adapter: "projector", "vision", or
            ends of dotted names, such as "embed_tokens" for the embeddings of new tokens. They
            belong to the model, not to one of its adapters.
        name: the adapter's. Letters, digits, _ and -.

    Returns:
        What was adapted.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a target, pattern or module is not in the model (the error says what is); a
            number is out of range; the model has an adapter of that name; a layer shares its
            weight with another module; DoRA beside a weight that is no plain or packed matrix; the
            model is sharded.
    """
    check_adapter(rank, alpha, dropout)
    check_name(name)
    for option, value in (("rslora", rslora), ("dora", dora)):
        if not isinstance(value, bool):
            raise TypeError(f"{option} must be a bool, got {type(value).__name__}")
    if name in lora_names(model):
        raise ValueError(f"name: the model has an adapter {name!r} already")
    if is_sharded(model):
        raise ValueError("this model is sharded: adapt it before sharding")
    chosen = find_targets(model, targets, ranks)
    own_alphas = ranked(list(chosen), alphas, "alphas")
    options = {}
    for each, own_rank in chosen.items():
        r = rank if own_rank is None else own_rank
        a = alpha if own_alphas[each] is None else own_alphas[each]
        check_adapter(r, a)
        options[each] = Options(r, a * math.sqrt(r) if rslora else a, dropout, dora)
    layers = {plain_name(model, each): layer for each, layer in adaptable_layers(model).items()}
    if tied := tied_layers(model, {each: layers[each] for each in chosen}):
        raise ValueError(
            f"targets: {listing(tied)} shares its weight with another module, so an adapter could "
            "not be merged"
        )
    modules = _find_modules(model, trained_modules, options)
    put_adapters(model, {layers[each]: own for each, own in options.items()}, name)
    for module in modules.values():
        module.requires_grad_(True)
    adapted = describe(model, name, tuple(modules))
    print(adapted, file=sys.stderr)
    return adapted


def describe(model: nn.Module, name: str, trained_modules: tuple[str, ...] = ()) -> Adapted:
    """What an adapter of a model consists of."""
    layers = plain_layers(model, name)
    adapters = {each: layer.adapters()[name] for each, layer in layers.items()}
    return Adapted(
        name,
        layers,
        {each: adapter.rank for each, adapter in adapters.items()},
        trained_modules,
        sum(
            parameter.numel()
            for adapter in adapters.values()
            for parameter in parts_of(adapter).values()
        ),
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def _find_modules(
    model: nn.Module, wanted: str | Iterable[str], adapted: Iterable[str]
) -> dict[str, nn.Module]:
    """Modules to train in full, by plain name; none may have an adapter, or be part of one."""
    texts = [wanted] if isinstance(wanted, str) else list(wanted)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"trained_modules must be str, got {texts!r}")
    layers = {*adapted, *plain_layers(model)}
    named = {plain_name(model, name): module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for text in texts:
        end = f".{_MODULES.get(text, text)}"
        found = {name: module for name, module in named.items() if f".{name}".endswith(end)}
        if not found:
            children = ", ".join(name for name in named if "." not in name)
            raise ValueError(f"trained_modules: the model has no {text!r}; it has {children}")
        for name, module in found.items():
            if next(module.parameters(), None) is None:
                raise ValueError(f"trained_modules: {name} has no parameters, or packed ones")
            if inside := [each for each in layers if f"{each}.".startswith(f"{name}.")]:
                raise ValueError(f"trained_modules: {name} has adapters: {listing(inside)}")
        chosen |= found
    return chosen
