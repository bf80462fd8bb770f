"""lora_linear and linear_cross_entropy on packed weights."""

import pytest
import torch

from helpers import BadCall, Sample, check_op, needs_kernels
from mllama.ops import (
    LoraLayer,
    linear_cross_entropy,
    lora_linear,
    lora_linears,
    pack_weight,
    unpack_weight,
)
from mllama.ops.linear_cross_entropy import reference as entropy_reference
from mllama.ops.lora_linear import reference as lora_reference
from mllama.ops.packed_layout import PACKINGS, pack

torch.manual_seed(0)
SEED = torch.tensor([1234567])
X, A, B, BIAS = torch.randn(4, 40), torch.randn(3, 40), torch.randn(24, 3), torch.randn(24)
PACKED = pack(torch.randn(24, 40), "int4")
INT4 = PACKINGS["int4"].number
operators = torch.ops.mllama


def lora_sample(packing, shape, out, rank, bias=True, **options):
    width = shape[-1]
    weight = pack(torch.randn(out, width) * width**-0.5, packing)
    a, b = torch.randn(rank, width) * width**-0.5, torch.randn(out, rank) * rank**-0.5
    arguments = torch.randn(shape), weight, a, b, torch.randn(out) if bias else None
    return Sample(arguments, options | {"packing": packing})


def lora(x=X, packed=PACKED, a=A, b=B, packing="int4", **options):
    return lora_linear(x, packed, a, b, packing=packing, **options)


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
def test_lora_linear(packing):
    check_op(
        lora_linear,
        lora_reference,
        [
            lora_sample(packing, (2, 5, 40), 24, 4, scale=2.0),
            lora_sample(packing, (33, 77), 41, 5, False, scale=0.5, dropout=0.3, seed=SEED),
        ],
        differentiable=(0, 2, 3, 4),
        keep_float32=(2, 3),
        thread_counts=(),  # the matrix product is torch's
    )


@needs_kernels
def test_registration_and_errors():
    lists = [PACKED], [A.clone().requires_grad_()], [B], [BIAS]
    torch.library.opcheck(operators.lora_linear.default, (X, *lists, None, [2.0], [0.0], [INT4]))
    torch.library.opcheck(
        operators._lora_linear_backward.default,
        (
            *([torch.randn(4, 24)], X, [PACKED], [A], [B], [BIAS], torch.randn(4, 3), None),
            *([2.0], [0.0], [INT4], True, True, True, True),
        ),
    )
    for bad in (
        BadCall(lambda: lora(packing="int3"), ValueError, "packing"),
        BadCall(lambda: lora(packing="int8"), ValueError, "weight"),
        BadCall(lambda: lora(packed=PACKED.float()), TypeError, "weight"),
        BadCall(lambda: lora(b=B[:5]), ValueError, "weight"),
        BadCall(lambda: lora(b=B.T), ValueError, "lora_b"),
        BadCall(lambda: lora_linear(X, PACKED, A, B), TypeError, "weight"),
    ):
        with pytest.raises(bad.error, match=bad.match):
            bad.call()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_formats_is_its_layers(dtype):
    """One input, weights in several formats and a dense one; large enough for several tiles."""
    shapes = {"int4": 700, "q6_k": 96, "bf16": 1300, None: 50}
    layers, parts = [], []
    for packing, out in shapes.items():
        weight = (torch.randn(out, 1600) / 40).to(dtype)
        a, b = torch.randn(4, 1600) / 40, torch.randn(out, 4)
        parts += [a.requires_grad_(), b.requires_grad_()]
        stored = weight if packing is None else pack_weight(weight, packing)
        layers.append(LoraLayer(stored, a, b, None, 0.5, 0.0, packing))
    x = torch.randn(7, 1600).to(dtype).requires_grad_()
    together = lora_linears(x, layers)
    dense = [
        layer
        if layer.packing is None
        else layer._replace(
            weight=unpack_weight(layer.weight, len(layer.lora_b), 1600, layer.packing, dtype=dtype),
            packing=None,
        )
        for layer in layers
    ]
    slopes = [torch.randn_like(y) for y in together]
    found = [*together, *torch.autograd.grad(together, (x, *parts), slopes)]
    apart = lora_linears(x, dense)
    expected = [*apart, *torch.autograd.grad(apart, (x, *parts), slopes)]
    bound = 4e-6 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


def entropy_sample(packing, rows, vocabulary, width, left_out=False, **options):
    weight = pack(torch.randn(vocabulary, width) * width**-0.5, packing)
    labels = torch.randint(vocabulary, rows)
    if left_out:  # not in a compiled call, which computes such rows too
        labels[..., ::3] = -100
    options |= {"out_features": vocabulary, "packing": packing}
    return Sample((torch.randn(*rows, width), weight, labels), options)


def entropy(packed=PACKED, out_features=24, packing="int4"):
    labels = torch.tensor([3, -100, 23, 0])
    return linear_cross_entropy(X, packed, labels, out_features=out_features, packing=packing)


@needs_kernels
@pytest.mark.parametrize("packing", ["int8", "int4", "bf16", "q6_k"])
def test_linear_cross_entropy(packing):
    check_op(
        linear_cross_entropy,
        entropy_reference,
        [
            entropy_sample(packing, (2, 7), 37, 40),
            entropy_sample(packing, (50,), 515, 64, softcap=3.0, reduction="sum"),
            entropy_sample(packing, (9,), 24, 33, True, reduction="none"),
            entropy_sample(packing, (2, 7), 37, 40, True),
        ],
        differentiable=(0,),
        thread_counts=(),  # the matrix product is torch's
        result_dtype=torch.float32,
        bad_calls=[
            BadCall(lambda: entropy(out_features=None), ValueError, "out_features"),
            BadCall(lambda: entropy(out_features=40), ValueError, "weight"),
            BadCall(lambda: entropy(packing="int3"), ValueError, "packing"),
            BadCall(lambda: entropy(packing="int8"), ValueError, "weight"),
            BadCall(lambda: entropy(packed=PACKED.float()), TypeError, "weight"),
            BadCall(lambda: entropy(packed=B, packing=None), ValueError, "out_features"),
        ],
    )


@needs_kernels
def test_a_large_packed_head():
    """Several chunks of rows and of the vocabulary."""
    weight = pack_weight(torch.randn(40_000, 64) / 8, "int8")
    dense = unpack_weight(weight, 40_000, 64, "int8")
    labels = torch.randint(40_000, (700,))
    found = []
    for options in (
        {"weight": weight, "out_features": 40_000, "packing": "int8"},
        {"weight": dense},
    ):
        hidden = torch.randn(700, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = linear_cross_entropy(hidden, labels=labels, **options)
        found.append((loss, *torch.autograd.grad(loss, hidden)))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
