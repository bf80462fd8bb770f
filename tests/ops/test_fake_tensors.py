"""Operators under FakeTensorMode, which has devices that this machine has not: results are on the
device of the arguments, and a tensor on another device is refused by its name.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from helpers import needs_kernels
from mllama import _ext, ops
from mllama.ops import _dispatch
from mllama.ops.cross_entropy import cross_entropy_
from mllama.ops.packed_gguf import GGUF_BLOCKS
from mllama.ops.packed_layout import PACKINGS, packed_bytes

DEVICES = ("cuda:0", "cuda:1")
F32, F64, I64 = torch.float32, torch.float64, torch.int64
U8, I8, BOOL = torch.uint8, torch.int8, torch.bool


@dataclass
class Call:
    """A call by keywords: shape of each tensor, with its dtype unless that is float32."""

    function: Callable
    tensors: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    needs_kernel: bool = False  # without one it looks at values, which a fake tensor has not

    def on(self, device: str, **others: str):
        """Its results with all tensors on the device but for `others`."""
        made = {}
        for name, kind in self.tensors.items():
            shape, dtype = kind if isinstance(kind[-1], torch.dtype) else (kind, F32)
            made[name] = torch.empty(shape, dtype=dtype, device=others.get(name, device))
        results = self.function(**made, **self.options)
        return results if isinstance(results, tuple) else (results,)


X, W = (2, 3, 32), (32,)
Q, KV = (2, 3, 4, 16), (2, 5, 2, 16)
MASKS = {
    "key_mask": ((2, 5), BOOL),
    "key_bias": (2, 5),
    "query_offset": ((2,), I64),
    "prefix_length": ((2,), I64),
    "first_key": ((2, 3), I64),
}
LORA = {"x": X, "weight": (8, 32), "lora_a": (4, 32), "lora_b": (8, 4), "bias": (8,)}
LORA |= {"seed": ((1,), I64)}
PACKED = ((packed_bytes(16, 32, "int8"),), U8)
INT8 = PACKINGS["int8"].number
CODES = ((2, 34), I8)
PIXELS = {"pixel_values": (1, 3, 4, 4), "weight": (5, 3, 2, 2), "bias": (5,)}
IMAGE = ((4, 5, 3), U8)
SIZE = {"height": 2, "width": 3}
RAW = torch.ops.mllama  # for calls that otherwise look at values of their result


def _lora_backward(x, weight, lora_a, lora_b, bias, seed, grad_y, small, dropout):
    lists = [weight], [lora_a], [lora_b], [bias]
    grad_x, grad_a, grads_b, grad_biases = RAW._lora_linear_backward(
        [grad_y], x, *lists, small, seed, [1.0], [dropout], [-1], *[True] * 4
    )
    return grad_x, grad_a, *grads_b, *grad_biases


CALLS = {
    "rms_norm": Call(ops.rms_norm, {"x": X, "weight": W}),
    "add_rms_norm": Call(ops.add_rms_norm, {"x": X, "residual": X, "weight": W}),
    "layer_norm": Call(ops.layer_norm, {"x": X, "weight": W, "bias": W}),
    "swiglu": Call(ops.swiglu, {"gate": X, "up": X}),
    "geglu": Call(ops.geglu, {"gate": X, "up": X}),
    "rope": Call(ops.rope, {"q": Q, "k": Q, "cos": (2, 3, 8), "sin": (2, 3, 8)}),
    "rope_tables": Call(ops.rope_tables, {"position_ids": ((2, 3), I64), "frequencies": (8,)}),
    "attention": Call(ops.attention, {"q": Q, "k": KV, "v": KV, **MASKS}, {"causal": True}),
    "attention, small heads": Call(
        ops.attention, {"q": (1, 2, 2, 4), "k": (1, 2, 1, 4), "v": (1, 2, 1, 4)}
    ),
    "attention_weights": Call(ops.attention_weights, {"q": Q, "k": KV, **MASKS}, {"causal": True}),
    "patch_embed": Call(ops.patch_embed, PIXELS),
    "lora_linear": Call(ops.lora_linear, LORA, {"dropout": 0.5}),
    "lora_linear, two layers": Call(
        lambda x, seed, **layer: tuple(
            ops.lora_linears(x, 2 * [ops.LoraLayer(**layer, dropout=0.5)], seed)
        ),
        LORA | {"seed": ((2,), I64)},
    ),
    "packed_linear": Call(
        ops.packed_linear,
        {"x": X, "weight": PACKED, "bias": (16,)},
        {"out_features": 16, "packing": "int8"},
    ),
    "dequantized_linear": Call(
        ops.dequantized_linear,
        {"x": X, "weight": PACKED, "bias": (16,)},
        {"out_features": 16, "packing": "int8"},
    ),
    **{
        f"pack_weight, {packing}": Call(
            ops.pack_weight, {"weight": (16, 32)}, {"packing": packing}, needs_kernel=True
        )
        for packing in PACKINGS
    },
    "unpack_weight": Call(
        ops.unpack_weight,
        {"packed": PACKED},
        {"out_features": 16, "in_features": 32, "packing": "int8"},
    ),
    "unpack_weight, rows": Call(
        lambda **tensors: RAW.unpack_weight(**tensors, out=16, width=32, packing=INT8, dtype=F32),
        {"weight": PACKED, "rows": ((3,), I64)},
        needs_kernel=True,
    ),
    **{
        f"pack_gguf, {packing}": Call(
            ops.pack_gguf, {"blocks": ((16, size), U8)}, {"packing": packing}, needs_kernel=True
        )
        for packing, (_, size) in GGUF_BLOCKS.items()
    },
    **{
        f"unpack_gguf, {packing}": Call(
            ops.unpack_gguf,
            {"packed": ((packed_bytes(16, width, packing),), U8)},
            {"out_features": 16, "in_features": width, "packing": packing},
        )
        for packing, (width, _) in GGUF_BLOCKS.items()
    },
    "quantize_rows": Call(ops.quantize_rows, {"x": X}),
    "dequantize_rows": Call(ops.dequantize_rows, {"codes": CODES}, {"size": 32}),
    "select_token": Call(
        ops.select_token, {"logits": (2, 9), "present": ((2, 9), BOOL)}, {"repetition_penalty": 1.5}
    ),
    "select_token, drawn": Call(
        lambda **tensors: RAW.select_token(
            **tensors, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5
        ),
        {"logits": (2, 9), "uniform": ((2,), F64), "present": ((2, 9), BOOL)},
        needs_kernel=True,
    ),
    "linear_cross_entropy, of rows": Call(
        cross_entropy_,
        {"scores": (3, 9), "targets": ((3,), I64)},
        {"softcap": 2.0, "gradient": 1.0},
    ),
    "resize": Call(
        RAW.resize, {"image": IMAGE}, SIZE | {"cubic": True, "height_first": True}, True
    ),
    "resize_normalize": Call(
        RAW.resize_normalize,
        {"image": IMAGE, "table": (256, 3)},
        SIZE | {"cubic": True, "height_first": True},
        needs_kernel=True,
    ),
}

ROWS, HEADS = (2, 3), (2, 4, 3, 2)  # sums of rows; attention's statistics
BACKWARD = {
    "rms_norm": Call(
        lambda **tensors: RAW._rms_norm_backward(**tensors, offset=0.0, weight_gradient=True),
        {"grad_y": X, "grad_hidden": X, "hidden": X, "weight": W, "rstd": ROWS},
    ),
    "layer_norm": Call(
        lambda **tensors: RAW._layer_norm_backward(**tensors, parameter_gradients=True),
        {"grad_y": X, "x": X, "weight": W, "bias": W, "statistics": (2, 3, 2)},
    ),
    "swiglu": Call(RAW._swiglu_backward, {"grad_y": X, "gate": X, "up": X}),
    "geglu": Call(RAW._geglu_backward, {"grad_y": X, "gate": X, "up": X}),
    "attention": Call(
        RAW._attention_backward,
        {"grad_out": Q, "q": Q, "k": KV, "v": KV, "out": Q, "statistics": HEADS, **MASKS},
        {"causal": True, "window": None, "scale": None, "softcap": None},
    ),
    "patch_embed": Call(
        RAW._patch_embed_backward,
        {"grad_y": (1, 4, 5), **PIXELS},
        dict.fromkeys(("pixel_gradient", "weight_gradient", "bias_gradient"), True),
    ),
    "dequantized_linear": Call(
        RAW._dequantized_linear_backward,
        {"grad_y": (2, 3, 16), "weight": PACKED},
        {"width": 32, "packing": INT8},
    ),
    "lora_linear": Call(
        _lora_backward, {"grad_y": (2, 3, 8), **LORA, "small": (2, 3, 4)}, {"dropout": 0.5}
    ),
}


@contextlib.contextmanager
def fake_tensors():
    """FakeTensorMode. Calls that slice and index need a torch that knows the device, not a GPU."""
    try:
        with FakeTensorMode(), torch.no_grad():
            yield
    except RuntimeError as error:
        if torch.backends.cuda.is_built() or "not linked with support for cuda" not in str(error):
            raise
        pytest.skip("needs a CUDA build of torch")


@pytest.fixture
def way(request, monkeypatch):
    """As a build with a CUDA kernel for every operator computes, or as one without any."""
    if request.param == "kernels" and _ext.disabled():
        pytest.skip("MLLAMA_DISABLE_OPS=1: there are no kernels")
    every = {operator.partition(",")[0] for operator in CALLS} | {"gated", "image"}
    kernels = every if request.param == "kernels" else ()
    monkeypatch.setattr(_dispatch, "_CUDA_OPERATORS", frozenset(kernels))


WAYS = [
    (name, way)
    for name, call in CALLS.items()
    for way in ("kernels", *(() if call.needs_kernel else ("references",)))
]


def test_every_operator_is_called():
    called = {name.partition(",")[0] for name in CALLS}
    assert called | {"rope_frequencies", "LoraLayer", "lora_linears"} == set(ops.__all__)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "way"), WAYS, indirect=["way"])
def test_results_are_where_the_arguments_are(name, device, way):
    with fake_tensors():
        results = CALLS[name].on(device)
    assert [result.device for result in results] == len(results) * [torch.device(device)]


@pytest.mark.parametrize("other", ["cuda:0", "cpu"])
@pytest.mark.parametrize(
    ("name", "way"), [way for way in WAYS if len(CALLS[way[0]].tensors) > 1], indirect=["way"]
)
def test_a_tensor_on_another_device_is_refused(name, other, way):
    call = CALLS[name]
    first, *others = call.tensors
    with fake_tensors():
        for tensor in others:
            with pytest.raises(ValueError, match=f"{tensor} is on {other}, {first} on cuda:1"):
                call.on("cuda:1", **{tensor: other})


@needs_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_are_where_the_arguments_are(name, device):
    with fake_tensors():
        gradients = BACKWARD[name].on(device)
    assert [g.device for g in gradients] == len(gradients) * [torch.device(device)]


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("pack_")])
def test_weights_are_packed_where_they_are(name, monkeypatch):
    """By plain torch, which looks at values when all is computed."""
    monkeypatch.setattr(_dispatch, "_CUDA_OPERATORS", frozenset())
    with fake_tensors(), pytest.raises(DataDependentOutputException):
        CALLS[name].on("cuda:1")


@pytest.mark.parametrize("device", DEVICES)
def test_frequencies_are_where_they_are_asked_for(device):
    with fake_tensors():
        assert ops.rope_frequencies(16, device=device).device == torch.device(device)
