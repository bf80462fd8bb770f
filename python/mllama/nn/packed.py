"""Linear layers and embeddings whose weight is packed (see `mllama.ops.packed_linear`).

In a state dict, "packed" has the weight's bytes and "format" says what they are: the text that
`PackedFormat.to_tensor` writes.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from mllama.nn.plain import is_plain
from mllama.ops.dequantized_linear import dequantized_linear
from mllama.ops.packed_layout import PACKINGS, packed_bytes
from mllama.ops.packed_linear import PACKED_ACTIVATIONS, packed_linear, unpack_weight

PACKED, FORMAT = "packed", "format"  # names in a state dict
_LONGEST_FORMAT = 64  # bytes


class PackedFormat(NamedTuple):
    """What the bytes of a packed weight are: one of PACKINGS, and the shape of the dense weight."""

    packing: str
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.packing} {self.rows}x{self.columns}"

    @property
    def nbytes(self) -> int:
        """Size of the packed weight."""
        return packed_bytes(self.rows, self.columns, self.packing)

    def to_tensor(self) -> torch.Tensor:
        """The text, such as "int4 1536x576", as ASCII in a uint8 tensor."""
        return torch.tensor(list(str(self).encode()), dtype=torch.uint8, device="cpu")

    @classmethod
    def from_tensor(cls, text: torch.Tensor) -> "PackedFormat":
        """The inverse of `to_tensor`.

        Raises:
            ValueError: it is no such text, or names an unknown format.
        """
        if text.dtype != torch.uint8 or text.dim() != 1 or len(text) > _LONGEST_FORMAT:
            raise ValueError(f"a format is a short uint8 text, got {text.dtype} {list(text.shape)}")
        written = bytes(text.tolist()).decode("ascii", "backslashreplace")
        found = re.fullmatch(r"(\w+) (\d{1,9})x(\d{1,9})", written, re.ASCII)
        if found is None or found[1] not in PACKINGS:
            raise ValueError(
                f"the format {written!r} is not known: {', '.join(PACKINGS)}, and ROWSxCOLUMNS are"
            )
        return cls(found[1], int(found[2]), int(found[3]))


class _Packed(nn.Module):
    """A layer with a packed weight: who asks for the dense one is told so."""

    packed: torch.Tensor
    packing: str

    @property
    def format(self) -> PackedFormat:
        """What `packed` is."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + FORMAT] = self.format.to_tensor()

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """As torch's, for a state of this layer's own format: others of its size would be read as
        other weights.
        """
        text = state_dict.get(prefix + FORMAT)
        if text is None:
            if prefix + PACKED in state_dict:
                error_msgs.append(f"{prefix}{PACKED} has no {prefix}{FORMAT} beside it")
                return
            if strict:
                missing_keys.append(prefix + FORMAT)
        else:
            try:
                found = PackedFormat.from_tensor(text)
            except ValueError as error:
                error_msgs.append(f"{prefix}{FORMAT}: {error}")
                return
            if found != self.format:
                error_msgs.append(
                    f"{prefix}{PACKED} is {found} in the state, and {self.format} in the model"
                )
                return
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing_keys, unexpected, error_msgs
        )
        unexpected_keys += [name for name in unexpected if name != prefix + FORMAT]

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"the weight of this {type(self).__name__} is packed as {self.packing}: this needs "
                "a model that mllama.optimize has not packed"
            )
        return super().__getattr__(name)


def packed_layer(
    module: nn.Linear | nn.Embedding, packed: torch.Tensor, packing: str, dtype: torch.dtype
) -> "PackedLinear | PackedEmbedding":
    """The layer that replaces one whose weight was packed.

    Args:
        module: the layer; it may be on the meta device.
        packed: its weight as `pack_weight` returns it.
        packing: the format.
        dtype: of an embedding's rows.
    """
    rows, columns = module.weight.shape
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", None)
        return PackedEmbedding(packed, rows, columns, packing, dtype, scale)
    bias = None if module.bias is None else module.bias.detach()
    return PackedLinear(packed, columns, rows, packing, bias)


class PackedLinear(_Packed):
    """y = x weight' + bias on a packed weight, which is frozen. x gets a gradient.

    In training, that is in training mode or where a gradient is wanted, it computes by
    `dequantized_linear`, as nn.Linear with the dense weight does, else by `packed_linear`.

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
        self.register_buffer(PACKED, packed)
        self.register_buffer("bias", bias)

    @property
    def format(self) -> PackedFormat:
        """What `packed` is."""
        return PackedFormat(self.packing, self.out_features, self.in_features)

    def forward(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype; activation is one of
        PACKED_ACTIVATIONS.
        """
        weight: dict[str, Any] = {"out_features": self.out_features, "packing": self.packing}
        if not self.is_trained(x):
            return packed_linear(x, self.packed, self.bias, **weight, activation=activation)
        y = dequantized_linear(x, self.packed, self.bias, **weight)
        return y if activation is None else PACKED_ACTIVATIONS[activation](y)

    def is_trained(self, *inputs: torch.Tensor) -> bool:
        """Whether a product is part of training. In training mode each is, so that activations are
        the same when checkpointing computes them with gradients and without.
        """
        return self.training or (
            torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
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


def takes_activation(module: nn.Module, activation: str) -> bool:
    """Whether it is a plain packed layer whose product can apply the activation."""
    return activation in PACKED_ACTIVATIONS and is_plain(module, PackedLinear)


class PackedEmbedding(_Packed):
    """Rows of a packed matrix, which the output head may share.

    Args:
        packed: uint8, as `pack_weight` returns it.
        num_embeddings, embedding_dim: sizes of the matrix.
        packing: its format.
        dtype: of the rows; `.to(dtype)` of the module changes it.
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
        self.packing, self.embed_scale = packing, embed_scale
        self.register_buffer(PACKED, packed)
        # Follows the model's dtype, as parameters do.
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype, device=packed.device), persistent=False
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._like.dtype

    @property
    def format(self) -> PackedFormat:
        """What `packed` is."""
        return PackedFormat(self.packing, self.num_embeddings, self.embedding_dim)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Change the dtype of the rows."""
        self._like = torch.empty(0, dtype=dtype, device=self.packed.device)

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
        return rows * rows.new_full((), self.embed_scale)  # filled on the device, not copied to it

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packing}"
