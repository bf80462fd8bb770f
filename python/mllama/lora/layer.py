"""A frozen linear layer with a trainable low-rank update beside it."""

from typing import Any

import torch
from torch import nn

from mllama.device import in_range
from mllama.lora.adapter import (
    DEFAULT,
    FIELDS,
    Adapter,
    Magnitude,
    check_adapter,
    check_name,
    dense_weight,
    matrix_of,
    name_adapters,
    row_norms,
)
from mllama.nn.adapted import AdaptedLinear, LowRank
from mllama.nn.checks import check_count
from mllama.nn.packed import PackedLinear
from mllama.nn.plain import is_plain
from mllama.ops._dispatch import FLOAT_DTYPES
from mllama.ops.lora_linear import LoraLayer, lora_linears


class Linear_LORA(AdaptedLinear):
    """y = x W' + bias + alpha / rank * (dropout(x) A') B', with W and bias frozen, A and B
    trainable (Hu et al., 2021).

    `linear` holds W and the bias, `lora_a` A [rank, in_dim], `lora_b` B [out_dim, rank], float32
    (float64 beside a layer of that dtype). A is initialized as nn.Linear's weights are (Kaiming
    uniform) and B with zeros, so a new layer computes what `linear` does. Any of the three may be
    replaced or copied into. The operator `mllama.ops.lora_linear` computes plain children. If one
    is of another class, has hooks, is float64 or is not frozen, the children are called one after
    the other. So they are if `linear` is packed and nothing is trained. A layer around a packed
    one cannot be merged.

    With `lora_magnitude`, DoRA (Liu et al., 2024): rows of W + update are scaled to trained norms.

    Of several adapters one is in use. Its parts are the layer's own, the others' are in `inactive`.

    Args:
        in_dim, out_dim: input and output features.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input element of the update, in training mode only.
        bias: whether `linear` has a bias.

    Attributes:
        rank, alpha: as given. `scale` is alpha / rank.
        dropout: an nn.Dropout.
        lora_magnitude: None, or a module whose `weight` [out_dim] has DoRA's magnitudes.
        enabled: False skips the update; set by `mllama.lora_disabled`.
        name: of the adapter whose parts these are.
        active: False skips it too; set by `mllama.activate_lora` where that adapter has no part.
        inactive: other adapters by name.
        merged_weight: [out_dim, in_dim] after `merge`, else None. Not in state dicts.

    Raises:
        TypeError: a size or rank is not an int; alpha or dropout is not a number.
        ValueError: a size or rank is below 1; alpha is not positive and finite; dropout is outside
            [0, 1).
    """

    lora_a: nn.Linear
    lora_b: nn.Linear
    lora_magnitude: Magnitude | None
    dropout: nn.Dropout
    rank: int
    alpha: float
    inactive: nn.ModuleDict
    merged_weight: torch.Tensor | None

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float, bias: bool = False
    ):
        check_adapter(rank, alpha, dropout)
        check_count("in_dim", in_dim)
        check_count("out_dim", out_dim)
        super().__init__()
        self._adapt(nn.Linear(in_dim, out_dim, bias=bias), DEFAULT, rank, alpha, dropout)

    @classmethod
    def around(
        cls,
        linear: nn.Linear | PackedLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dora: bool = False,
        name: str = DEFAULT,
    ) -> "Linear_LORA":
        """Wrap a linear layer, which is frozen. The adapter gets its device and training mode."""
        check_adapter(rank, alpha, dropout)
        check_name(name)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, name, rank, alpha, dropout, dora)
        return layer

    def _adapt(self, linear: nn.Linear | PackedLinear, name: str, *options: Any) -> None:
        self.linear = linear.requires_grad_(False)
        adapter = Adapter(linear, *options)
        for field in FIELDS:
            setattr(self, field, getattr(adapter, field))
        self.name, self.active, self.enabled = name, True, True
        self.inactive = nn.ModuleDict()
        self.register_buffer("merged_weight", None, persistent=False)
        self.train(linear.training)

    @property
    def is_on(self) -> bool:
        """Whether forward adds an update."""
        return self.enabled and self.active

    def adapters(self) -> "dict[str, Linear_LORA | Adapter]":
        """Each adapter's parts by its name; those of the current one are the layer's own."""
        others: Any = self.inactive
        return {self.name: self, **others}

    def add(
        self, name: str, rank: int, alpha: float, dropout: float = 0.0, dora: bool = False
    ) -> None:
        """Add a new adapter, which is inactive.

        Raises:
            ValueError: there is one of this name, or a number is out of range.
        """
        check_adapter(rank, alpha, dropout)
        check_name(name)
        if name in self.adapters():
            raise ValueError(f"there is an adapter {name!r} already")
        made = Adapter(self.linear, rank, alpha, dropout, dora)
        self.inactive[name] = made.requires_grad_(False).train(self.training)

    def activate(self, name: str) -> None:
        """Use the adapter of this name: its parts become the layer's own, and are trainable; those
        of the others are frozen.

        Raises:
            ValueError: the layer is merged.
            KeyError: it has no such adapter.
        """
        if self.merged_weight is not None:
            raise ValueError("a merged adapter is in use: call mllama.unmerge_lora(model) first")
        if name != self.name:
            other = self.inactive[name]
            for field in FIELDS:
                own = getattr(self, field)
                setattr(self, field, getattr(other, field))
                setattr(other, field, own)
            other.requires_grad_(False).train(self.training)
            # In place of the other one, so that activating that again restores everything.
            renamed = {self.name if key == name else key: own for key, own in self.inactive.items()}
            self.inactive.clear()
            self.inactive.update(renamed)
            self.name = name
        self.active = True
        for parameter in self.adapter():
            parameter.requires_grad_(True)

    def deactivate(self) -> None:
        """Skip the update, because the model's active adapter is not in this layer."""
        if self.merged_weight is not None:
            raise ValueError("a merged adapter is in use: call mllama.unmerge_lora(model) first")
        self.active = False
        for parameter in self.adapter():
            parameter.requires_grad_(False)

    @property
    def scale(self) -> float:
        """Factor of the update, alpha / rank."""
        return float(self.alpha / self.rank)

    @property
    def in_features(self) -> int:
        """As nn.Linear's."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """As nn.Linear's."""
        return self.linear.out_features

    @property
    def weight(self) -> torch.Tensor:
        """[out_dim, in_dim], W with the update added, for modules that read a layer's weight
        instead of calling it, such as nn.MultiheadAttention. Computed on every access: to copy
        weights in, write to `linear.weight`.
        """
        if not self.is_on:
            return self.linear.weight
        return self._sum() if self.merged_weight is None else self.merged_weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of `linear`."""
        return self.linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_dim] -> [..., out_dim].

        Raises:
            ValueError: the layer is merged and would be trained.
        """
        if not self.is_on:
            return self.linear(x)
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    "this LoRA layer is merged, so its adapter would not learn: call "
                    "mllama.unmerge_lora(model) before training"
                )
            return nn.functional.linear(x, self.merged_weight, self.linear.bias)
        if self.lora_magnitude is None:
            return self._low_rank(x, self.linear.bias)
        y = self._low_rank(x, None)
        y = (y * self._row_factors()).to(y.dtype)
        return y if self.linear.bias is None else y + self.linear.bias.to(y.dtype)

    def operands(self, x: torch.Tensor) -> LoraLayer | None:
        if not self.is_on or self.merged_weight is not None or self.lora_magnitude is not None:
            return None
        return self._operands(x, self.linear.bias)

    def _operands(self, x: torch.Tensor, bias: torch.Tensor | None) -> LoraLayer | None:
        """What the operator computes x W' + update from, and the bias; None where calling the
        children would do something else.
        """
        if not (self._is_plain(x) or self._is_trained_beside_packed(x)):
            return None
        dropout = self.dropout.p if self.dropout.training else 0.0
        weights = matrix_of(self.linear), self.lora_a.weight, self.lora_b.weight
        return LoraLayer(*weights, bias, self.scale, dropout, getattr(self.linear, "packing", None))

    def _low_rank(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W' + update, and the bias of `linear`, or None for none."""
        if (operands := self._operands(x, bias)) is not None:
            return lora_linears(x, [operands])[0]
        y = self.linear(x)
        if bias is None and self.linear.bias is not None:
            y = y - self.linear.bias.to(y.dtype)
        if isinstance(self.linear, PackedLinear) and self._has_plain_adapter():
            down = nn.functional.linear(self.dropout(x).float(), self.lora_a.weight.float())
            update = nn.functional.linear(down, self.lora_b.weight.float())
            return y + (update * self.scale).to(y.dtype)
        down = self.lora_a(self.dropout(x).to(self.lora_a.weight.dtype))
        return y + (self.lora_b(down) * self.scale).to(y.dtype)

    def _row_factors(self) -> torch.Tensor:
        """[out_dim] in float32 or wider: DoRA's magnitudes over the norms of the rows of W +
        update, which have no gradient. Computed with a temporary matrix of W's size.
        """
        assert self.lora_magnitude is not None
        with torch.no_grad():
            norms = row_norms(self._direction())
        return self.lora_magnitude.weight.to(norms.dtype) / norms

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether the operator computes what calling the children would."""
        if not all(is_plain(child, nn.Linear) for child in (self.linear, self.lora_a, self.lora_b)):
            return False
        weight = self.linear.weight
        return not weight.requires_grad and weight.dtype in FLOAT_DTYPES and x.dtype in FLOAT_DTYPES

    def _is_trained_beside_packed(self, x: torch.Tensor) -> bool:
        """The same where `linear` is packed, as long as something is trained: else x is rounded."""
        return (
            is_plain(self.linear, PackedLinear)
            and self._has_plain_adapter()
            and x.dtype in FLOAT_DTYPES
            and self.linear.is_trained(x, *self.adapter())
        )

    def _has_plain_adapter(self) -> bool:
        """Whether A and B alone say what the update is, in dtypes that operators take."""
        return all(
            is_plain(child, nn.Linear) and child.bias is None and child.weight.dtype in FLOAT_DTYPES
            for child in (self.lora_a, self.lora_b)
        )

    def update(self) -> LowRank | None:
        if not self.is_on:
            return None
        if self.lora_magnitude is not None:
            raise ValueError("an adapter has magnitudes (DoRA)")
        if not self._has_plain_adapter():
            raise ValueError("an adapter has hooks, a bias, a forward of its own or another dtype")
        if self.merged_weight is not None or (self.training and self.dropout.p):
            raise ValueError("an adapter is merged, or drops elements")
        return LowRank(self.lora_a.weight, self.lora_b.weight, self.scale)

    def adapter(self) -> list[nn.Parameter]:
        """The trainable parameters of the current adapter: A, B, and DoRA's magnitudes."""
        parts = (self.lora_a, self.lora_b, self.lora_magnitude)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def merge(self) -> None:
        """Add the update to a copy of W, which forward uses until `unmerge`. W is not changed.

        Raises:
            ValueError: a child is not a plain linear layer, or float16 cannot hold the sum.
        """
        self.merged_weight = self.summed("this layer").detach()

    def unmerge(self) -> None:
        """Drop the merged weight."""
        self.merged_weight = None

    def unload(self) -> nn.Linear:
        """Return `linear` with the update, if it is active, added to its weight, as a new
        parameter: modules that share the old one keep it. The layer is marked, because later
        adapters of the model do not belong to the checkpoint it was loaded from.
        """
        if not self.active:
            return self.linear
        self.linear.weight = nn.Parameter(self.summed("this layer").detach(), requires_grad=False)
        self.linear.__dict__["holds_adapter"] = True
        return self.linear

    def check_mergeable(self, name: str) -> None:
        """Raise ValueError unless `linear` and the adapter are plain linear layers, so that the
        update can be added to the weight.
        """
        for child in ("linear", "lora_a", "lora_b"):
            module = getattr(self, child)
            if not is_plain(module, nn.Linear):
                raise ValueError(
                    f"{name} cannot be merged: its {child}, a {type(module).__name__}, has hooks "
                    "or a forward of its own"
                )

    def summed(self, name: str) -> torch.Tensor:
        """The merged weight. Raises ValueError as `merge`, of the layer by this name."""
        self.check_mergeable(name)
        return in_range(f"{name}.weight with its adapter merged", self.linear.weight, self._sum())

    def _sum(self) -> torch.Tensor:
        """[out_dim, in_dim] in W's dtype: the merged weight, rounded once."""
        weight = self._direction()
        if self.lora_magnitude is not None:
            weight = weight * self._row_factors()[:, None]
        return weight.to(self.linear.weight.dtype)

    def _direction(self) -> torch.Tensor:
        """[out_dim, in_dim], W + update in float32 or wider."""
        weight = dense_weight(self.linear)
        kind = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            update = self.lora_b.weight.to(kind) @ self.lora_a.weight.to(kind)
            return torch.add(weight.to(kind), update, alpha=self.scale)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Accept the weights of a plain linear layer for `linear`, and drop the merged weight."""
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state_dict:
                state_dict.setdefault(f"{prefix}linear.{name}", state_dict.pop(f"{prefix}{name}"))
        self.unmerge()
        name_adapters(state_dict, prefix, self.name, self.inactive.keys())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"rank={self.rank}, alpha={self.alpha}"
        text += "" if self.name == DEFAULT and not self.inactive else f", name={self.name!r}"
        text += ", merged" if self.merged_weight is not None else ""
        return text + (", disabled" if not self.is_on else "")


def lora_layers(model: nn.Module) -> dict[str, Linear_LORA]:
    """LoRA layers of a module by dotted name, each once.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"LoRA is for a torch.nn.Module, got {type(model).__name__}")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear_LORA)}


def needed_lora_layers(model: nn.Module) -> dict[str, Linear_LORA]:
    """`lora_layers` of a model that must have some.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layers.
    """
    if not (layers := lora_layers(model)):
        raise ValueError(
            f"this {type(model).__name__} has no LoRA layers: call "
            "mllama.convert_linears_to_lora(model) first"
        )
    return layers


def active_name(model: nn.Module) -> str | None:
    """Name of the adapter in use, None without LoRA layers."""
    return next((layer.name for layer in lora_layers(model).values() if layer.active), None)
