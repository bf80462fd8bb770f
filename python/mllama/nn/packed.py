"""Linear layers and embeddings whose weight is packed (see `mllama.ops.packed_linear`)."""

from typing import Any

import torch
from torch import nn

from mllama.ops.packed_linear import packed_linear, unpack_weight


class _Packed(nn.Module):
    """A layer with a packed weight: who asks for the dense one is told so."""

    packed: torch.Tensor
    packing: str

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"the weight of this {type(self).__name__} is packed as {self.packing}: this needs "
                "a model that mllama.optimize has not packed"
            )
        return super().__getattr__(name)


class PackedLinear(_Packed):
    """y = x weight' + bias on a packed weight, for inference.

    Args:
        packed: uint8, as `pack_weight` returns it.
        in_features, out_features: sizes of the weight.
        packing: its format.
        bias: float [out_features], or None.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        in_features: int,
        out_features: int,
        packing: str,
        bias: torch.Tensor | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.packing = in_features, out_features, packing
        self.register_buffer("packed", packed)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype."""
        return packed_linear(
            x, self.packed, self.bias, out_features=self.out_features, packing=self.packing
        )

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the packed one stands for, [out_features, in_features]."""
        return unpack_weight(
            self.packed, self.out_features, self.in_features, self.packing, dtype=dtype
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, {self.packing}, bias={self.bias is not None}"
        )


class PackedEmbedding(_Packed):
    """Rows of a packed matrix, which the output head may share.

    Args:
        packed: uint8, as `pack_weight` returns it.
        num_embeddings, embedding_dim: sizes of the matrix.
        packing: its format.
        dtype: of the rows.
        embed_scale: factor on them, in their dtype; None is 1.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        num_embeddings: int,
        embedding_dim: int,
        packing: str,
        dtype: torch.dtype,
        embed_scale: float | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.packing, self.dtype, self.embed_scale = packing, dtype, embed_scale
        self.register_buffer("packed", packed)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int [...] -> [..., embedding_dim]."""
        rows = unpack_weight(
            self.packed,
            self.num_embeddings,
            self.embedding_dim,
            self.packing,
            rows=input_ids.flatten().long(),
            dtype=self.dtype,
        ).view(*input_ids.shape, self.embedding_dim)
        if self.embed_scale is None:
            return rows
        return rows * torch.tensor(self.embed_scale, dtype=rows.dtype, device=rows.device)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packing}"
