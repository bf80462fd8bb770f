"""Decoding by one operator call per pass: a decoder whose linear layers are packed, with low-rank
adapters or without, as `decode_step` (csrc/decode) reads it.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mllama import _ext
from mllama.config.spec import TextSpec
from mllama.fusion.base import DecoderInputs, ModelInputs
from mllama.fusion.cross_attention import CrossAttention, CrossAttentionDecoderLayer
from mllama.nn.adapted import AdaptedLinear, LowRank, adapter_state
from mllama.nn.attention import CausalAttention
from mllama.nn.cache import Cache
from mllama.nn.mlp import GatedMLP
from mllama.nn.norm import RMSNorm
from mllama.nn.packed import PackedLinear
from mllama.nn.plain import all_plain, is_plain
from mllama.nn.rope import RotaryEmbedding
from mllama.ops._dispatch import use_kernel
from mllama.ops.decode import decode_step
from mllama.ops.packed_layout import PACKINGS
from mllama.text.decoder import Decoder, DecoderLayer, count_positions

_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
MAX_ROWS = 16


class FastDecoder:
    """The C++ side's view of a decoder.

    It reads the modules once: after a change of the model, make another. A change of adapters
    (attached, replaced, switched on or off) is detected. Their values are shared.

    Args:
        decoder: a `Decoder` whose linear layers are all packed, or adapters beside packed ones.

    Raises:
        ValueError: it cannot run so; see `find_obstacle`.
    """

    def __init__(self, decoder: nn.Module):
        self._changes = adapter_state()
        if (obstacle := find_obstacle(decoder)) is not None:
            raise ValueError(f"decoder cannot run by decode_step: {obstacle}")
        self.decoder = decoder
        spec: TextSpec = decoder.config
        self._cross = frozenset(spec.cross_attention_layers)
        self._handle = torch.ops.mllama._decoder_new(*_describe(decoder))
        weakref.finalize(self, torch.ops.mllama._decoder_free, self._handle)

    @property
    def is_current(self) -> bool:
        """False after adapters of any model changed."""
        return self._changes == adapter_state()

    def __reduce__(self):
        """A copy is None: the handle is this object's, and a copied model makes its own."""
        return type(None), ()

    def __call__(self, prepared: DecoderInputs, cache: Cache) -> torch.Tensor:
        """Append positions to the cache, where `find_obstacle_of_pass` finds nothing. A position's
        result has the same bits whatever stands beside it in the pass.

        Args:
            prepared: embeddings [B, T, hidden], with what the decoder takes beside them.
            cache: of this decoder, with a position in it.

        Returns:
            The last hidden state, float32 [B, T, hidden], after the final norm.

        Raises:
            ValueError: adapters changed.
        """
        if not self.is_current:
            raise ValueError("decoder: adapters changed, make another FastDecoder")
        (B, T, _), length = prepared.embeds.shape, cache.length
        positions, mask = prepared.position_ids, prepared.padding_mask
        if positions is None:
            positions = count_positions(mask, T, length, prepared.embeds.device)
        if not isinstance(length, torch.Tensor):
            length = torch.full((1,), length, dtype=torch.int64, device=prepared.embeds.device)
        keys, values, image_keys = cache.reserve(T, self._cross)
        cross, visible, key_mask = prepared.cross, None, None
        if cross is None:
            image_keys = 0
        else:
            visible = cross.visible if cross.visible is None else cross.visible.flatten()
            key_mask = cross.segments[0].key_mask if cross.segments else None
        hidden = decode_step(
            self._handle,
            # It is overwritten.
            prepared.embeds.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            positions.expand(B, T).long().contiguous(),
            keys,
            values,
            length,
            None if mask is None else (mask == 0).sum(1),
            image_keys,
            key_mask,
            visible,
        )
        cache.advance(T)
        return hidden


def find_obstacle_of_pass(inputs: ModelInputs, prepared: DecoderInputs) -> str | None:
    """Why a pass of positions after others cannot run by `decode_step` on a decoder that can; None
    where it can.
    """
    B, T, _ = prepared.embeds.shape
    cache, mask, cross = inputs.cache, prepared.padding_mask, prepared.cross
    if torch.is_grad_enabled() and prepared.embeds.requires_grad:
        return "it is differentiated"
    if not 0 < B * T <= MAX_ROWS:
        return f"it has {B * T} rows, not 1 to {MAX_ROWS}"
    if inputs.output_attentions or inputs.output_hidden_states:
        return "attentions or hidden states are asked for"
    if prepared.first_key is not None or (cross is not None and cross.states is not None):
        return "it has packed rows or new images"
    if cross is not None and cross.segments is not None and len(cross.segments) > 1:
        return "its positions see different images"
    positions = prepared.position_ids
    if positions is not None and list(positions.shape) not in ([1, T], [B, T]):
        return "its position_ids are of another shape"
    if positions is not None and (positions.is_floating_point() or positions.dtype == torch.bool):
        return "its position_ids are no integers"
    if (inputs.attention_mask is not None and mask is None) or (
        mask is not None and mask.shape != (B, inputs.past + T)
    ):
        return "its attention_mask is not [batch, past + new]"
    if mask is not None and not _is_padded_left(mask, T):
        return "its padding is not on the left"
    return cache.in_place_obstacle(B)


def _is_padded_left(mask: torch.Tensor, new: int) -> bool:
    """Whether the rows of a mask [B, S] are zeros, if any, and then ones, `new` of them or more."""
    keep = mask != 0
    return bool(keep[:, -new:].all()) and not bool((keep[:, :-1] > keep[:, 1:]).any())


def find_obstacle(decoder: nn.Module) -> str | None:
    """Why a decoder cannot run by `decode_step`; None where it can."""
    if _ext.disabled():
        return "the compiled operators are disabled"
    if not _is_as_built(decoder):
        return "a module of it has a hook, or is another one than it was built with"
    spec: TextSpec = decoder.config
    if spec.hidden_act not in _ACTIVATIONS:
        return f"its activation is {spec.hidden_act}"
    if spec.head_dim > 256:
        return f"its heads are {spec.head_dim} wide, more than 256"
    for group in (group for layer in decoder.layers for group in _linears(layer)):
        bases = [_base(linear) for linear in group]
        if not all(is_plain(base, PackedLinear) for base in bases):
            return "not all of its linear layers are packed"
        if len({PACKINGS[base.packing].quantized for base in bases}) > 1:
            return "linear layers with the same input differ in how they are packed"
        try:
            [_update(linear) for linear in group]
        except ValueError as error:
            return str(error)
    parts = nn.ModuleList([decoder.layers, decoder.norm])
    devices = {tensor.device for tensor in (*parts.parameters(), *parts.buffers())}
    if len(devices) > 1:
        return f"it is on several devices: {', '.join(sorted(map(str, devices)))}"
    if not use_kernel("decode", decoder.norm.weight):
        return f"there is no kernel for {decoder.norm.weight.device}"
    return None


def _is_as_built(decoder: nn.Module) -> bool:
    """Whether calls of its modules do what the modules that it was built with do, and all of its
    layers run, in their order.
    """
    if not all(is_plain(module, kind) for module, kind in _parts(decoder)):
        return False
    places = [_attention(layer).layer_idx for layer in decoder.layers]
    return places == list(range(decoder.config.num_hidden_layers)) and all_plain(decoder)


def _parts(decoder: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The modules that `decode_step` stands for, beside linear layers, and what built ones are. To
    be read as far as they are so: others need not have such parts.
    """
    yield decoder, Decoder
    yield decoder.norm, RMSNorm
    for rotary in decoder.rotary:
        yield rotary, RotaryEmbedding
    for layer, own in zip(decoder.layers, decoder.config.layers, strict=False):
        crossed = own.attention == "cross"
        yield layer, CrossAttentionDecoderLayer if crossed else DecoderLayer
        yield _attention(layer), CrossAttention if crossed else CausalAttention
        yield layer.mlp, GatedMLP
        yield from ((norm, RMSNorm) for norm in _norms(layer) if norm is not None)


def _attention(layer: nn.Module) -> nn.Module:
    return layer.cross_attn if isinstance(layer, CrossAttentionDecoderLayer) else layer.self_attn


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


def _describe(decoder: nn.Module) -> tuple[list[torch.Tensor], list[int], list[float]]:
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
        len(decoder.rotary),
    ]
    numbers = [spec.rms_norm_eps, spec.norm_offset]
    device = decoder.norm.weight.device
    tensors += [_floats(rotary.frequencies.to(device)) for rotary in decoder.rotary]
    for layer, own, rope in zip(decoder.layers, spec.layers, decoder.rope_of_layer, strict=False):
        sizes += [own.attention == "cross", rope, own.window or 0]
        numbers += [spec.head_dim**-0.5 if own.scale is None else own.scale, own.softcap or 0.0]
        numbers += _gates(layer)
        tensors += [_floats(norm and norm.weight) for norm in _norms(layer)]
        for linear in (linear for group in _linears(layer) for linear in group):
            _add_linear(linear, tensors, sizes, numbers)
    tensors.append(_floats(decoder.norm.weight))
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
    tensors += [base.packed.detach(), _floats(base.bias)]
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
