"""What all operators share before their kernels run."""

import pytest
import torch
from torch.autograd import forward_ad

from helpers import needs_kernels
from mllama import ops

X, W = torch.randn(3, 8), torch.randn(8)
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
    with pytest.raises(
        ValueError, match=f"{name} is on meta, .* on cpu; all must be on one device"
    ):
        call()


def test_all_on_meta_gives_meta():
    assert ops.rms_norm(X.to("meta"), META).shape == X.shape


@needs_kernels
def test_forward_mode_derivatives_are_refused():
    with pytest.raises(NotImplementedError, match="mllama::swiglu has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.swiglu(x, x), (X,), (X,))
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="mllama::rms_norm has no forward-mode derivative"),
    ):
        ops.rms_norm(forward_ad.make_dual(X, X), W)
    with forward_ad.dual_level():
        assert ops.rms_norm(X, W).shape == X.shape
