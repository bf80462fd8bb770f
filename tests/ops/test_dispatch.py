"""What all operators share before and after their kernels run."""

import pytest
import torch
from torch.autograd import forward_ad

from helpers import needs_kernels
from mllama import ops
from mllama.ops.rms_norm import _rms_norm_backward

X, W = torch.randn(3, 8), torch.randn(8)
Q = torch.randn(1, 3, 2, 16)
META = torch.ones(8, device="meta")


@needs_kernels
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ops.rms_norm(X, META), "weight"),
        (lambda: ops.layer_norm(X, W, META), "bias"),
        (lambda: ops.add_rms_norm(X, X.to("meta"), W), "residual"),
        (lambda: ops.swiglu(X, X.to("meta")), "up"),
        (lambda: ops.geglu(X, X.to("meta")), "up"),
        (lambda: ops.attention(Q, Q, Q.to("meta")), "v"),
        (lambda: ops.rope(Q, Q, torch.ones(1, 3, 8), torch.ones(1, 3, 8, device="meta")), "sin"),
        (
            lambda: ops.lora_linear(
                X, torch.zeros(5, 8, device="meta"), torch.zeros(2, 8), torch.zeros(5, 2)
            ),
            "weight",
        ),
        (
            lambda: ops.patch_embed(
                torch.zeros(1, 3, 4, 4), torch.zeros(5, 3, 2, 2, device="meta")
            ),
            "weight",
        ),
    ],
)
def test_a_meta_tensor_beside_real_ones_is_refused(call, name):
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        call()


def test_all_on_meta_gives_meta():
    assert ops.rms_norm(X.to("meta"), META).shape == X.shape


CALLS = {
    "rms_norm": lambda x: ops.rms_norm(x, W),
    "layer_norm": lambda x: ops.layer_norm(x, W, W),
    "swiglu": lambda x: ops.swiglu(x, x),
    "lora_linear": lambda x: ops.lora_linear(x, W[None], W[None], torch.ones(1, 1)),
    "attention": lambda x: ops.attention(*3 * [x.unflatten(1, (1, 1, 8))]),
}


@needs_kernels
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_derivatives_are_refused(name):
    """torch.library would take them for zero."""
    call = CALLS[name]
    wide = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(call, (wide,), (wide,))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(forward_ad.make_dual(wide, wide))
        assert torch.equal(call(wide), call(wide.clone()))


@needs_kernels
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name):
    """In each of the ways to take one."""

    def loss(x):
        return CALLS[name](x).square().sum()

    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.functional.hessian(loss, x)
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises((NotImplementedError, RuntimeError)):
            outer(torch.func.grad(loss))(x)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(torch.func.grad(loss), (x,), (x,))


@needs_kernels
def test_errors_of_the_kernel_alone_are_value_errors():
    """Those of a derivative, which has no check of its own."""
    with pytest.raises(ValueError, match="invalid grad_y"):
        _rms_norm_backward(X[:2], None, X, W, torch.ones(3), 0.0, False)
