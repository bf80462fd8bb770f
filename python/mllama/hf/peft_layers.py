"""PEFT's LoRA layers on this package's operator. Imported when PEFT has adapted a model."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from mllama.nn.plain import is_plain
from mllama.ops._dispatch import FLOAT_DTYPES
from mllama.ops.lora_linear import lora_linear


class OperatorLinear(Linear):
    """PEFT's layer, computed by `mllama.ops.lora_linear` where one plain LoRA adapter is in use.
    Everything else goes PEFT's own way: variants such as DoRA, several adapters at once, merged
    or disabled ones, hooks, trained base weights.

    Dropout draws its mask from torch's generator in another way than nn.Dropout.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        name = None if args or kwargs else self._plain_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        return lora_linear(
            x,
            base.weight,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            base.bias,
            float(self.scaling[name]),
            float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
        )

    def _plain_adapter(self, x: torch.Tensor) -> str | None:
        """Name of the adapter in use, if the operator computes what PEFT would."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or self.fan_in_fan_out:
            return None
        (name,) = names
        # Releases before variants have switches by adapter.
        if name in getattr(self, "lora_variant", ()) or getattr(self, "use_dora", {}).get(name):
            return None
        base, down, up = self.get_base_layer(), self.lora_A[name], self.lora_B[name]
        if not all(is_plain(child, nn.Linear) for child in (base, down, up)):
            return None
        if type(self.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return None
        tensors = x, base.weight, down.weight, up.weight
        floats = all(tensor.dtype in FLOAT_DTYPES for tensor in tensors)
        trained = base.weight.requires_grad or down.bias is not None or up.bias is not None
        return name if floats and not trained else None


def adopt(model: nn.Module) -> None:
    """Let PEFT's layers in a model run on the operator."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = OperatorLinear
