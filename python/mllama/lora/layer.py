"""A frozen linear layer with a trainable low-rank update beside it."""

import math
import numbers
from typing import Any

import torch
from torch import nn

from mllama.nn.adapted import AdaptedLinear, LowRank
from mllama.nn.packed import PackedLinear
from mllama.nn.plain import is_plain
from mllama.ops._dispatch import FLOAT_DTYPES
from mllama.ops.lora_linear import LoraLayer, lora_linears


class Linear_LORA(AdaptedLinear):
    """y = x W' + bias + alpha / rank * (dropout(x) A') B', with W and bias frozen, A and B
    trainable (Hu et al., 2021).

    `linear` holds W and the bias, `lora_a` A [rank, in_dim], `lora_b` B [out_dim, rank]. A is
    initialized as nn.Linear's weights are (Kaiming uniform) and B with zeros, so a new layer
    computes what `linear` does. Any of the three may be replaced or copied into. The operator
    `mllama.ops.lora_linear` computes plain children. If one is of another class, has hooks, is
    float64 or is not frozen, the children are called one after the other. So they are if `linear`
    is packed and nothing is trained. A layer around a packed one cannot be merged.

    Args:
        in_dim, out_dim: input and output features.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input element of the update, in training mode only.
        bias: whether `linear` has a bias.

    Attributes:
        rank, alpha: as given. `scale` is alpha / rank.
        dropout: an nn.Dropout.
        enabled: False skips the update; set by `mllama.lora_disabled`.
        merged_weight: [out_dim, in_dim] after `merge`, else None. Not in state dicts.

    Raises:
        TypeError: a size or rank is not an int; alpha or dropout is not a number.
        ValueError: a size or rank is below 1; alpha is not positive and finite; dropout is outside
            [0, 1).
    """

    merged_weight: torch.Tensor | None

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float, bias: bool = False
    ):
        check_adapter(rank, alpha, dropout)
        _check_size("in_dim", in_dim)
        _check_size("out_dim", out_dim)
        super().__init__()
        self._adapt(nn.Linear(in_dim, out_dim, bias=bias), rank, alpha, dropout)

    @classmethod
    def around(
        cls, linear: nn.Linear | PackedLinear, rank: int, alpha: float, dropout: float = 0.0
    ) -> "Linear_LORA":
        """Wrap a linear layer, which is frozen. The adapter gets its device, dtype and training
        mode; float32 beside packed weights.
        """
        check_adapter(rank, alpha, dropout)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(linear, rank, alpha, dropout)
        return layer

    def _adapt(
        self, linear: nn.Linear | PackedLinear, rank: int, alpha: float, dropout: float
    ) -> None:
        self.linear = linear.requires_grad_(False)
        like = matrix_of(linear)
        # float32 next to quantized weights
        dtype = like.dtype if like.dtype in (*FLOAT_DTYPES, torch.float64) else torch.float32
        options: dict[str, Any] = {"bias": False, "device": like.device, "dtype": dtype}
        self.lora_a = nn.Linear(linear.in_features, rank, **options)
        self.lora_b = nn.Linear(rank, linear.out_features, **options)
        nn.init.zeros_(self.lora_b.weight)
        self.dropout = nn.Dropout(float(dropout))
        self.rank, self.alpha, self.enabled = rank, alpha, True
        self.register_buffer("merged_weight", None, persistent=False)
        self.train(linear.training)

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
        if not self.enabled:
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
        if not self.enabled:
            return self.linear(x)
        if self.merged_weight is not None:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    "this LoRA layer is merged, so its adapter would not learn: call "
                    "mllama.unmerge_lora(model) before training"
                )
            return nn.functional.linear(x, self.merged_weight, self.linear.bias)
        if (operands := self.operands(x)) is not None:
            return lora_linears(x, [operands])[0]
        y = self.linear(x)
        if isinstance(self.linear, PackedLinear) and self._has_plain_adapter():
            down = nn.functional.linear(self.dropout(x).float(), self.lora_a.weight.float())
            update = nn.functional.linear(down, self.lora_b.weight.float())
            return y + (update * self.scale).to(y.dtype)
        down = self.lora_a(self.dropout(x).to(self.lora_a.weight.dtype))
        return y + (self.lora_b(down) * self.scale).to(y.dtype)

    def operands(self, x: torch.Tensor) -> LoraLayer | None:
        if not self.enabled or self.merged_weight is not None:
            return None
        if not (self._is_plain(x) or self._is_trained_beside_packed(x)):
            return None
        dropout = self.dropout.p if self.dropout.training else 0.0
        weights = matrix_of(self.linear), self.lora_a.weight, self.lora_b.weight
        packing = getattr(self.linear, "packing", None)
        return LoraLayer(*weights, self.linear.bias, self.scale, dropout, packing)

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
        if not self.enabled:
            return None
        if not self._has_plain_adapter():
            raise ValueError("an adapter has hooks, a bias, a forward of its own or another dtype")
        if self.merged_weight is not None or (self.training and self.dropout.p):
            raise ValueError("an adapter is merged, or drops elements")
        return LowRank(self.lora_a.weight, self.lora_b.weight, self.scale)

    def adapter(self) -> list[nn.Parameter]:
        """The trainable parameters: A and B."""
        return [*self.lora_a.parameters(), *self.lora_b.parameters()]

    def merge(self) -> None:
        """Add the update to a copy of W, which forward uses until `unmerge`. W is not changed.

        Raises:
            ValueError: a child is not a plain linear layer.
        """
        self.check_mergeable("this layer")
        self.merged_weight = self._sum().detach()

    def unmerge(self) -> None:
        """Drop the merged weight."""
        self.merged_weight = None

    def unload(self) -> nn.Linear:
        """Return `linear` with the update added to its weight, as a new parameter: modules that
        share the old one keep it. The layer is marked, because later adapters of the model do not
        belong to the checkpoint it was loaded from.
        """
        self.check_mergeable("this layer")
        self.linear.weight = nn.Parameter(self._sum().detach(), requires_grad=False)
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

    def _sum(self) -> torch.Tensor:
        """[out_dim, in_dim] in W's dtype; computed in float32 or wider and rounded once."""
        weight = self.linear.weight
        kind = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            update = self.lora_b.weight.to(kind) @ self.lora_a.weight.to(kind)
            return torch.add(weight.to(kind), update, alpha=self.scale).to(weight.dtype)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Accept the weights of a plain linear layer for `linear`, and drop the merged weight."""
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state_dict:
                state_dict.setdefault(f"{prefix}linear.{name}", state_dict.pop(f"{prefix}{name}"))
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        text = f"rank={self.rank}, alpha={self.alpha}"
        text += ", merged" if self.merged_weight is not None else ""
        return text + (", disabled" if not self.enabled else "")


def matrix_of(linear: nn.Linear | PackedLinear) -> torch.Tensor:
    """The tensor that holds a layer's weight, packed or not."""
    return linear.packed if isinstance(linear, PackedLinear) else linear.weight


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


def holds_adapters(model: nn.Module) -> bool:
    """Whether adapters were added to the model's weights permanently, so that its checkpoint has
    other weights.
    """
    return any("holds_adapter" in vars(module) for module in model.modules())


def check_adapter(rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Raise TypeError or ValueError for an invalid rank, alpha or dropout."""
    _check_size("rank", rank)
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
