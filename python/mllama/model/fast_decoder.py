"""Decoding by one operator call per token: a decoder whose linear layers are packed, with low-rank
adapters or without, as `decode_step` (csrc/decode) reads it.
"""

import weakref
from typing import Any

import torch
from torch import nn

from mllama import _ext
from mllama.config.spec import TextSpec
from mllama.fusion.cross_attention import CrossAttentionDecoderLayer
from mllama.fusion.cross_context import CrossAttentionContext
from mllama.nn.adapted import AdaptedLinear, LowRank, count_changes
from mllama.nn.kv_cache import KVCache
from mllama.nn.packed import PackedLinear
from mllama.ops.packed_layout import PACKINGS

_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
MAX_ROWS = 16


class FastDecoder:
    """The C++ side's view of a decoder and its head.

    It reads the modules once: after a change of the model, make another. A change of adapters
    (attached, replaced, switched on or off) is detected. Their values are shared.

    Args:
        decoder: a `Decoder` whose linear layers are all packed, or adapters beside packed ones.
        head: the output head, as these.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module):
        self._changes = count_changes()
        if (obstacle := find_obstacle(decoder, head)) is not None:
            raise ValueError(f"decoder cannot run by decode_step: {obstacle}")
        self.decoder, self.head = decoder, head
        self.spec: TextSpec = decoder.config
        self.embed_tokens, self.rotary = decoder.embed_tokens, decoder.rotary
        tensors, sizes, numbers = _describe(decoder, head)
        self._handle = torch.ops.mllama._decoder_new(tensors, sizes, numbers)
        weakref.finalize(self, torch.ops.mllama._decoder_free, self._handle)

    @property
    def is_current(self) -> bool:
        """False after adapters of any model changed."""
        return self._changes == count_changes()

    def __reduce__(self):
        """A copy is made of the copied modules: the handle is this object's, in this process."""
        return FastDecoder, (self.decoder, self.head)

    def step(
        self,
        ids: torch.Tensor,
        cache: KVCache,
        first_key: torch.Tensor | None = None,
        cross: CrossAttentionContext | None = None,
    ) -> torch.Tensor:
        """Append one position per row to the cache.

        Args:
            ids: int64 [B], with B at most MAX_ROWS.
            cache: of this decoder, with a position in it.
            first_key: int64 [B], how many positions at a row's front are padding. Default: none.
            cross: what layers that attend to images are told; without it they do nothing.

        Returns:
            Logits, float32 [B, vocabulary].

        Raises:
            ValueError: adapters changed.
        """
        if not self.is_current:
            raise ValueError("decoder: adapters changed, make another FastDecoder")
        length = cache.length
        positions = torch.full_like(ids, length)
        if first_key is not None:
            positions -= first_key
        tables = [rotary(positions[:, None]) for rotary in self.rotary]  # of (B, 1, D / 2)
        keys, values, image_keys = cache.reserve(1, self.spec.cross_attention_layers)
        hidden = self.embed_tokens(ids).float()
        visible = key_mask = None
        if cross is None:
            image_keys = 0
        else:
            visible = cross.visible if cross.visible is None else cross.visible.flatten()
            key_mask = cross.segments[0].key_mask if cross.segments else None
        logits = torch.ops.mllama.decode_step(
            self._handle,
            hidden,
            [cos.contiguous() for cos, _ in tables],
            [sin.contiguous() for _, sin in tables],
            keys,
            values,
            length,
            first_key,
            image_keys,
            key_mask,
            visible,
        )
        cache.advance(1)
        return logits


def fast_decoder(
    decoder: nn.Module, head: nn.Module, known: FastDecoder | None = None
) -> FastDecoder | None:
    """The `FastDecoder` of a decoder and its head: `known`, if it is current; None where the layers
    have to run.
    """
    if known is not None and known.is_current:
        return known
    return FastDecoder(decoder, head) if find_obstacle(decoder, head) is None else None


def find_obstacle(decoder: nn.Module, head: nn.Module) -> str | None:
    """Why a decoder cannot run by `decode_step`; None where it can."""
    if _ext.disabled():
        return "the compiled operators are disabled"
    spec: TextSpec = decoder.config
    if spec.hidden_act not in _ACTIVATIONS:
        return f"its activation is {spec.hidden_act}"
    if spec.head_dim > 256:
        return f"its heads are {spec.head_dim} wide, more than 256"
    groups = [group for layer in decoder.layers for group in _linears(layer)]
    for group in (*groups, (head,)):
        bases = [_base(linear) for linear in group]
        if not all(isinstance(base, PackedLinear) for base in bases):
            return "not all of its linear layers are packed"
        if len({PACKINGS[base.packing].quantized for base in bases}) > 1:
            return "linear layers with the same input differ in how they are packed"
        try:
            [_update(linear) for linear in group]
        except ValueError as error:
            return str(error)
    if (device := _base(head).packed.device).type != "cpu":
        return f"it is on {device}"
    return None


def _base(linear: nn.Module) -> Any:
    return linear.linear if isinstance(linear, AdaptedLinear) else linear


def _update(linear: nn.Module) -> LowRank | None:
    return linear.update() if isinstance(linear, AdaptedLinear) else None


def _linears(layer: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """A layer's linear layers, by their inputs; those of images' keys have done their part."""
    mlp = layer.mlp
    if isinstance(layer, CrossAttentionDecoderLayer):
        inputs = (layer.cross_attn.q_proj,), (layer.cross_attn.o_proj,)
    else:
        attention = layer.self_attn
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)
    return (*inputs, (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,))


def _norms(layer: nn.Module) -> tuple[nn.Module | None, ...]:
    """Before attention, after it or before the feed-forward block, before and after that, of the
    heads of q and of k.
    """
    first = layer.input_layernorm, layer.post_attention_layernorm
    if isinstance(layer, CrossAttentionDecoderLayer):
        return (*first, None, None, layer.cross_attn.q_norm, None)
    attention = layer.self_attn
    blocks = (
        (layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm)
        if layer.post_norms
        else (None, None)
    )
    heads = (attention.q_norm, attention.k_norm) if attention.has_qk_norm else (None, None)
    return (*first, *blocks, *heads)


def _describe(
    decoder: nn.Module, head: nn.Module
) -> tuple[list[torch.Tensor], list[int], list[float]]:
    """The lists that csrc/ops/decode.cpp reads, in its order."""
    spec: TextSpec = decoder.config
    tensors: list[torch.Tensor] = []
    sizes = [
        spec.hidden_size,
        spec.num_attention_heads,
        spec.num_key_value_heads,
        spec.head_dim,
        spec.intermediate_size,
        _ACTIVATIONS[spec.hidden_act],
        len(decoder.layers),
    ]
    numbers = [spec.rms_norm_eps, spec.norm_offset, spec.final_logit_softcapping or 0.0]
    for layer, own, rope in zip(decoder.layers, spec.layers, decoder.rope_of_layer, strict=True):
        sizes += [own.attention == "cross", rope, own.window or 0]
        numbers += [spec.head_dim**-0.5 if own.scale is None else own.scale, own.softcap or 0.0]
        numbers += _gates(layer)
        tensors += [_floats(norm and norm.weight) for norm in _norms(layer)]
        for linear in (linear for group in _linears(layer) for linear in group):
            _add_linear(linear, tensors, sizes, numbers)
    tensors.append(_floats(decoder.norm.weight))
    sizes.append(head.out_features)
    _add_linear(head, tensors, sizes, numbers)
    return tensors, sizes, numbers


def _gates(layer: nn.Module) -> list[float]:
    if not isinstance(layer, CrossAttentionDecoderLayer):
        return [1.0, 1.0]
    gates = layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate
    return [gate.detach().float().tanh().item() for gate in gates]


def _add_linear(
    linear: nn.Module, tensors: list[torch.Tensor], sizes: list[int], numbers: list[float]
) -> None:
    base, update = _base(linear), _update(linear)
    sizes.append(PACKINGS[base.packing].number)
    tensors += [base.packed, _floats(base.bias)]
    sizes.append(0 if update is None else len(update.a))
    if update is not None:
        tensors += [update.a.detach().contiguous(), update.b.detach().contiguous()]
        numbers.append(update.scale)


def _floats(x: torch.Tensor | None) -> torch.Tensor:
    """float32 and contiguous; empty for None."""
    return (
        torch.empty(0, dtype=torch.float32, device="cpu")
        if x is None
        else x.detach().float().contiguous()
    )
