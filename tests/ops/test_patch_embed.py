import pytest
import torch

from helpers import THROWN, BadCall, Sample, check_op, needs_kernels
from mllama.ops import patch_embed
from mllama.ops.patch_embed import reference

torch.manual_seed(0)
X, W, B = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4), torch.randn(5)


def sample(batch, channels, rows, columns, patch, embed, bias=True):
    scale = (channels * patch * patch) ** -0.5
    weight = torch.randn(embed, channels, patch, patch) * scale
    return Sample(
        (
            torch.randn(batch, channels, rows * patch, columns * patch),
            weight,
            torch.randn(embed) if bias else None,
        )
    )


@needs_kernels
@pytest.mark.parametrize("keep", [(), (1, 2)], ids=["parameters as the images", "f32 parameters"])
def test_patch_embed(keep):
    operators = torch.ops.mllama
    check_op(
        patch_embed,
        reference,
        [
            sample(2, 3, 2, 3, 4, 32),
            sample(1, 1, 3, 1, 7, 5, bias=False),
            sample(3, 2, 1, 2, 1, 17),
            sample(0, 3, 2, 2, 4, 8),
        ],
        keep_float32=keep,
        raw=[
            (operators.patch_embed.default, (X, W.clone().requires_grad_(), B)),
            (operators.patch_embed.default, (X.clone().requires_grad_(), W, None)),
            (
                operators._patch_embed_backward.default,
                (torch.randn(2, 6, 5), X, W, B, True, True, True),
            ),
            (
                operators._patch_embed_backward.default,
                (torch.randn(2, 6, 5), X, W, None, False, True, False),
            ),
        ],
        bad_calls=[
            BadCall(lambda: patch_embed(None, W, B), TypeError, "pixel_values"),
            BadCall(
                lambda: patch_embed(X.byte(), W, B),
                TypeError,
                "pixel_values must be float32, bfloat16 or float16, got uint8",
            ),
            BadCall(
                lambda: patch_embed(X[0], W, B),
                ValueError,
                r"pixel_values must be \[B, C, height, width\], got \[3, 8, 12\]",
            ),
            BadCall(
                lambda: patch_embed(X, W[..., :2], B),
                ValueError,
                r"\[E, C, p, p\] with C and p > 0, got \[5, 3, 4, 2\]",
            ),
            BadCall(lambda: patch_embed(X, W[..., :0, :0], B), ValueError, "with C and p > 0"),
            BadCall(
                lambda: patch_embed(X[:, :2], W, B),
                ValueError,
                "pixel_values have 2 channels, weight takes 3",
            ),
            BadCall(
                lambda: patch_embed(X[..., :10], W, B),
                ValueError,
                "of 8 x 10 pixels cannot be cut into patches of 4 x 4",
            ),
            BadCall(lambda: patch_embed(X, W, B[:3]), ValueError, r"bias must be \[5\], got \[3\]"),
            BadCall(
                lambda: operators.patch_embed(X[..., :10], W, B), THROWN, "invalid pixel_values"
            ),
            BadCall(lambda: operators.patch_embed(X, W, B[:3]), THROWN, "invalid bias"),
        ],
    )


def test_order_of_patches():
    """Row by row from the top left: patch n of an image that is its number everywhere is that
    number.
    """
    numbers = torch.arange(6.0).view(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    result = patch_embed(numbers[None, None], torch.full((1, 1, 4, 4), 1 / 16))
    torch.testing.assert_close(result.flatten(), torch.arange(6.0))


def test_channels_last_images():
    torch.testing.assert_close(
        patch_embed(X.to(memory_format=torch.channels_last), W, B), patch_embed(X, W, B)
    )


def test_autocast_leaves_it_alone():
    """The result has the images' dtype and bits, gradients too, though the matrix product inside
    is one that autocast rounds.
    """
    weight = W.clone().requires_grad_()
    expected = torch.autograd.grad(patch_embed(X, weight, B).square().sum(), weight)[0]
    with torch.autocast(X.device.type, torch.bfloat16):
        result = patch_embed(X, weight, B)
        gradient = torch.autograd.grad(result.square().sum(), weight)[0]
    assert torch.equal(result, patch_embed(X, W, B))
    assert torch.equal(gradient, expected)


def test_matches_torch():
    expected = torch.nn.functional.conv2d(X, W, B, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patch_embed(X, W, B), expected)


def test_result_can_be_changed_in_place():
    weight = torch.randn(5, 3, 2, 2, requires_grad=True)
    y = patch_embed(torch.randn(1, 3, 4, 4), weight)
    y += 1
    y.sum().backward()
    assert weight.grad is not None
