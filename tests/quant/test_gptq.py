"""Codes that are chosen for a layer's inputs."""

import copy

import pytest
import torch

from helpers import needs_kernels
from mllama import optimize
from mllama.nn.packed import PackedLinear
from mllama.ops import pack_weight, unpack_weight
from mllama.quant.gptq import pack_int4
from tiny import pairs

pytestmark = needs_kernels


def inputs(rows: int, width: int, seed: int) -> torch.Tensor:
    """Whose coordinates go together, as those of a network's layers do."""
    directions = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    share = torch.randn(rows, width // 4, generator=generator)
    return share @ directions + 0.3 * torch.randn(rows, width, generator=generator)


@pytest.mark.parametrize("shape", [(64, 96), (33, 70), (5, 31), (16, 256)], ids=str)
def test_less_error_on_other_inputs(shape):
    weight = torch.randn(shape)
    known, other = inputs(500, shape[1], 1), inputs(300, shape[1], 2)

    def error(packed: torch.Tensor) -> float:
        difference = unpack_weight(packed, *shape, "int4") - weight
        return ((other @ difference.T).norm() / (other @ weight.T).norm()).item()

    plain = pack_weight(weight, "int4")
    packed = pack_int4(weight, known.T @ known)
    assert packed.shape == plain.shape and packed.dtype == torch.uint8
    assert error(packed) < 0.7 * error(plain)


def test_inputs_that_do_not_go_together_change_little():
    weight = torch.randn(32, 64)
    plain, packed = (
        unpack_weight(bytes_, 32, 64, "int4")
        for bytes_ in (pack_weight(weight, "int4"), pack_int4(weight, torch.eye(64)))
    )
    assert torch.allclose(plain, packed, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_few_inputs_and_ones_of_other_sizes(rows):
    weight, x = torch.randn(16, 256), inputs(rows, 256, 1)
    x[:, 5] *= 1e4
    x[:, 100:200] = x[:, :100]
    x[:, 250] *= 1e-6
    packed = unpack_weight(pack_int4(weight, x.T @ x), 16, 256, "int4")
    plain = unpack_weight(pack_weight(weight, "int4"), 16, 256, "int4")
    errors = [(x @ (dense - weight).T).norm() for dense in (packed, plain)]
    assert errors[0] < errors[1]


def test_inputs_that_are_always_zero():
    weight, x = torch.randn(16, 40), inputs(100, 40, 1)
    x[:, 7] = x[:, 33:] = 0
    dense = unpack_weight(pack_int4(weight, x.T @ x), 16, 40, "int4")
    assert dense.isfinite().all()
    assert unpack_weight(pack_int4(weight, torch.zeros(40, 40)), 16, 40, "int4").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_and_zero_weights(dtype):
    x = inputs(100, 32, 1)
    for weight in (torch.zeros(16, 32), torch.full((16, 32), -2.0), torch.full((16, 32), 3.0)):
        packed = pack_int4(weight.to(dtype), x.T @ x)
        torch.testing.assert_close(unpack_weight(packed, 16, 32, "int4"), weight, rtol=1e-2, atol=0)


def test_what_it_does_not_take():
    weight, infinite = torch.randn(16, 32), torch.eye(32)
    infinite[0, 0] = float("inf")
    for hessian in (torch.eye(31), infinite, -torch.eye(32)):
        with pytest.raises(ValueError, match="hessian"):
            pack_int4(weight, hessian)
    with pytest.raises(ValueError, match="weight"):
        pack_int4(weight * float("nan"), torch.eye(32))


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "mllama"])
def test_models(case):
    """Whose layers have the formats that they have without calibration; the text comes closer."""
    dense, ids = pairs.pair(case).ours, torch.randint(0, 90, (6, 64))
    plain = optimize(copy.deepcopy(dense), "int4")
    packed = optimize(copy.deepcopy(dense), "int4", ids)
    formats = [
        {n: m.packing for n, m in model.named_modules() if isinstance(m, PackedLinear)}
        for model in (plain, packed)
    ]
    assert formats[0] == formats[1] and packed.packed_weights == "int4"
    with torch.no_grad():
        expected, without, with_text = (
            model(input_ids=ids).logits for model in (dense, plain, packed)
        )
    assert (with_text - expected).norm() < 0.9 * (without - expected).norm()


@pytest.mark.parametrize(
    ("calibration", "error"),
    [
        ([[1, 2]], TypeError),
        (torch.ones(1, 2), TypeError),
        (torch.tensor([1, 2]), ValueError),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError),
        (torch.tensor([[1, 10**6]]), IndexError),
        (torch.tensor([[-1, 1]]), IndexError),
    ],
)
def test_texts_that_are_not_taken(calibration, error):
    model = copy.deepcopy(pairs.pair("llama").ours)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match="calibration"):
        optimize(model, "int4", calibration)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="calibration"):
        optimize(model, "int8", torch.tensor([[1, 2]]))
