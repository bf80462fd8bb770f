"""The weight of an output head, dense or packed, and its products with a few rows."""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from mllama.ops._dispatch import check_device, check_tensors
from mllama.ops.dequantized_linear import dequantized_linear, dequantized_product
from mllama.ops.packed_linear import check_packed, check_packing

# MKL is a third slower with some rows of x and all of a vocabulary's columns at once.
_ROWS, _COLUMNS = 16, 1024


class Head(NamedTuple):
    """weight is [vocabulary, in]; with the other two, uint8 as `pack_weight` returns it."""

    weight: torch.Tensor
    out_features: int | None
    packing: str | None

    @property
    def vocabulary(self) -> int:
        """Number of rows."""
        return len(self.weight) if self.out_features is None else self.out_features

    def to(self, dtype: torch.dtype) -> "Head":
        """As products with rows of this dtype take it."""
        return self if self.packing else self._replace(weight=self.weight.to(dtype))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, vocabulary]."""
        if self.packing is None:
            return _product(hidden, self.weight)
        return dequantized_linear(
            hidden, self.weight, out_features=self.vocabulary, packing=self.packing
        )

    def gradient(self, scores: torch.Tensor, width: int) -> torch.Tensor:
        """[n, vocabulary] -> [n, width], for hidden."""
        if self.packing is None:
            return scores @ self.weight
        return dequantized_product(scores, self.weight, width, self.packing)

    def check(self, op: str, hidden: torch.Tensor) -> None:
        """Raise TypeError or ValueError unless it fits rows of hidden."""
        width, weight = hidden.shape[-1], self.weight
        if self.packing is not None:
            check_packing(op, self.packing)
            if type(self.out_features) is not int or self.out_features < 1:
                raise ValueError(
                    f"{op}: out_features must be the rows of the packed weight, "
                    f"got {self.out_features!r}"
                )
            check_packed(op, weight, self.out_features, width, self.packing)
            check_device(op, "weight", weight, "hidden", hidden)
            return
        check_tensors(op, hidden=hidden, weight=weight)
        if self.out_features is not None:
            raise ValueError(
                f"{op}: out_features is for a packed weight, got {self.out_features!r}"
            )
        if weight.dim() != 2 or weight.shape[1] != width or not len(weight):
            raise ValueError(
                f"{op}: weight must be [vocabulary, {width}] for hidden {list(hidden.shape)}, "
                f"got {list(weight.shape)}"
            )


def _product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden W'; of float32 on a CPU some columns at a time, as in csrc/ops/frozen_weight.h."""
    if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or len(hidden) < _ROWS:
        return linear(hidden, weight)
    logits = hidden.new_empty(len(hidden), len(weight))
    for columns, rows in zip(logits.split(_COLUMNS, 1), weight.split(_COLUMNS), strict=True):
        torch.mm(hidden, rows.T, out=columns)
    return logits
