"""What is recomputed in the backward pass instead of being saved."""

import pytest
import torch

import mllama
from benchmarks.harness import saved_bytes
from helpers import needs_kernels
from mllama.nn.mlp import GatedMLP
from mllama.ops import (
    add_rms_norm,
    attention,
    geglu,
    layer_norm,
    lora_linear,
    rms_norm,
    rope,
    swiglu,
)
from mllama.ops.recompute import note_of, recomputable

W, A, B = torch.randn(6, 64), torch.randn(2, 64), torch.randn(6, 2)
SCALE, SHIFT = torch.rand(64) + 0.5, torch.randn(64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def noted(x, other):
    """Each kind of tensor that is computed again, by name."""
    return {
        "rms_norm": rms_norm(x, SCALE),
        "Gemma's rms_norm": rms_norm(x, SCALE, offset=1.0),
        "add_rms_norm": add_rms_norm(x, other, SCALE)[0],
        "layer_norm": layer_norm(x, SCALE, SHIFT),
        "swiglu": swiglu(x, other),
        "geglu": geglu(x, other),
    }


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_computed_again_has_the_same_bits(dtype):
    x, other = leaf(37, 64, dtype=dtype), leaf(37, 64, dtype=dtype)
    for name, result in noted(x, other).items():
        note = note_of(result)
        assert torch.equal(note.function(*note.inputs), result), name


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_heads_are_computed_from_what_their_norm_saves(dtype):
    heads, angles = leaf(2, 5, 3, 64, dtype=dtype), torch.randn(1, 5, 32)
    tables, more = (angles.cos(), angles.sin()), leaf(2, 5, 1, 64, dtype=dtype)
    rotated, plain = rope(rms_norm(heads, SCALE), more, *tables)
    note = note_of(rotated)
    assert torch.equal(note.function(*note.inputs), rotated)
    assert any(tensor is heads for tensor in note.inputs)
    assert note_of(plain) is None  # nobody saves what it was rotated from


def gradients(x, other, change=lambda tensor: tensor):
    """Of what lora_linear does with every kind of tensor."""
    outputs = [
        lora_linear(change(tensor), W, A, B).square().sum() for tensor in noted(x, other).values()
    ]
    return torch.autograd.grad(outputs, (x, other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits(dtype):
    x, other = leaf(3, 64, dtype=dtype), leaf(3, 64, dtype=dtype)
    saving = gradients(x, other, lambda tensor: tensor.view_as(tensor))  # views have no note
    assert all(map(torch.equal, gradients(x, other), saving))


@needs_kernels
@pytest.mark.parametrize("number", range(6))
def test_the_inputs_are_saved_in_place_of_the_result(number):
    x, other = leaf(3, 64), leaf(3, 64)
    result = list(noted(x, other).values())[number]
    arguments = [W, A, B, SCALE, SHIFT, *note_of(result).inputs]
    keeping = saved_bytes(lambda: lora_linear(result.view_as(result), W, A, B), arguments)
    assert saved_bytes(lambda: lora_linear(result, W, A, B), arguments) == keeping - result.nbytes


@needs_kernels
def test_attention_saves_what_norms_save():
    def run(change):
        heads, v = leaf(1, 5, 2, 64), leaf(1, 5, 2, 64)
        q, k = change(rms_norm(heads, SCALE)), change(rms_norm(v, SCALE))
        arguments = [heads, v, SCALE]
        saved = saved_bytes(lambda: attention(q, k, v, causal=True), arguments)
        return saved, q.nbytes + k.nbytes

    (saved, _), (keeping, both) = run(lambda x: x), run(lambda x: x.view_as(x))
    assert saved == keeping - both


@needs_kernels
def test_values_that_were_written_in_place_are_saved():
    x = leaf(3, 64)
    y = rms_norm(x * 1, SCALE)
    y.mul_(2)
    assert note_of(y) is None
    hidden = x * 1
    y = rms_norm(hidden, SCALE)
    hidden.add_(1)
    assert note_of(y) is None


def test_a_note_ends_with_its_tensor():
    from mllama.ops import recompute

    before = len(recompute._NOTES)
    x = leaf(3)
    y = recomputable(x * 2, lambda x: x * 2, x)
    assert len(recompute._NOTES) == before + 1
    del y
    assert len(recompute._NOTES) == before


def test_nothing_is_noted_without_gradients():
    with torch.no_grad():
        assert note_of(rms_norm(leaf(3, 64), SCALE)) is None
    assert note_of(rms_norm(torch.randn(3, 64), SCALE)) is None


@needs_kernels
def test_autocast_computes_the_cast_again():
    x = leaf(3, 64)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = rms_norm(x, SCALE)
        saved = saved_bytes(lambda: lora_linear(y, W, A, B), [W, A, B, x, SCALE])
        keeping = saved_bytes(lambda: lora_linear(y.view_as(y), W, A, B), [W, A, B, x, SCALE])
    assert saved == keeping - y.nbytes // 2


def test_a_block_that_uses_it_compiles_in_one_graph():
    block, x = GatedMLP(6, 10), torch.randn(2, 6)
    mllama.convert_linears_to_lora(block, rank=2)

    def loss(x):
        return block(x).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


@needs_kernels
def test_second_derivatives_are_refused():
    x = leaf(3, 64)
    y = lora_linear(rms_norm(x, SCALE), W, A, B).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        grad.sum().backward()
