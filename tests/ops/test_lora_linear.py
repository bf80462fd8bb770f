import pytest
import torch
from torch.utils.checkpoint import checkpoint

import devices
from helpers import (
    THROWN,
    BadCall,
    Sample,
    check_op,
    instruction_set,
    instruction_sets,
    needs_kernels,
)
from mllama.ops import LoraLayer, lora_linear, lora_linears
from mllama.ops.lora_linear import keep_mask, reference

torch.manual_seed(0)
X, W, A, B, BIAS = (
    torch.randn(4, 8),
    torch.randn(5, 8),
    torch.randn(3, 8),
    torch.randn(5, 3),
    torch.randn(5),
)
SEED = torch.tensor([-(1 << 62) - 12345])
GRAD = torch.randn(4, 5)
ALL = (True, True, True, True)
operators = torch.ops.mllama


def raw(
    x, weights, a, b, biases=(), seeds=None, scales=(2.0, 0.5), dropouts=(0.0, 0.0), small=None
):
    """The operator's arguments for dense weights; with `small`, of its backward pass after the
    gradients.
    """
    count = len(weights)
    numbers = list(scales[:count]), list(dropouts[:count])
    return (
        *(x, weights, a, b, list(biases)),
        *(() if small is None else (small,)),
        *(seeds, *numbers, [-1] * count),
    )


def group_lists(differentiable):
    """Two layers' tensors."""
    lists = [W, W * 2], [A, A * 2], [B, B * 2], [BIAS, BIAS * 2]
    if differentiable:
        lists = [[tensor.clone() for tensor in tensors] for tensors in lists]
        for tensor in (*lists[1], *lists[2]):
            tensor.requires_grad_()
    return lists


def allocations(call):
    """Sizes in bytes of what torch's allocator gives out in a call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's matrix product takes some scratch for each
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
    finally:
        torch.set_num_threads(threads)
    return [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]


def inputs(shape, out, rank, dtype=torch.float32, adapters=torch.float32):
    """x, weight, lora_a, lora_b, bias, scaled so that all results are near 1."""
    width = shape[-1]
    weight, a = (
        torch.randn(out, width) * max(width, 1) ** -0.5,
        torch.randn(rank, width) * max(width, 1) ** -0.5,
    )
    b, bias = torch.randn(out, rank) * rank**-0.5, torch.randn(out)
    return (
        torch.randn(shape).to(dtype),
        weight.to(dtype),
        a.to(adapters),
        b.to(adapters),
        bias.to(dtype),
    )


def sample(shape, out, rank, bias=True, **kwargs):
    *tensors, shift = inputs(shape, out, rank)
    return Sample((*tensors, shift if bias else None), kwargs)


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def results(function, x, weight, a, b, bias, grad_y, **kwargs):
    """y and the gradients of x, lora_a, lora_b, bias."""
    x, a, b, bias = leaves(x, a, b, bias)
    y = function(x, weight, a, b, bias, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b, bias), grad_y)]


@needs_kernels
@pytest.mark.parametrize(
    "keep", [(), (2, 3), (1, 3, 4)], ids=["all as x", "f32 adapters", "f32 weight, bias and B"]
)
def test_lora_linear(keep):
    small = operators.lora_linear(*raw(X, [W], [A], [B], [BIAS], SEED, [0.5], [0.25]))[1]
    check_op(
        lora_linear,
        reference,
        [
            sample((2, 5, 40), 24, 4, scale=2.0),
            sample((33, 77), 401, 5, bias=False, scale=0.5, dropout=0.3, seed=SEED),
            sample((9,), 13, 16),
            sample((70, 17), 20, 49, dropout=0.5, seed=SEED),
            sample((3, 300), 7, 1, bias=False),
            sample((0, 8), 4, 2, dropout=0.1, seed=SEED),
            sample((5, 8), 0, 2),
            sample((2, 0), 3, 2),
        ],
        differentiable=(0, 2, 3, 4),
        keep_float32=keep,
        thread_counts=(),  # see test_the_number_of_threads_does_not_matter
        raw=[
            (operators.lora_linear.default, raw(X, [W], [A.clone().requires_grad_()], [B], [BIAS])),
            (
                operators.lora_linear.default,
                raw(X.clone().requires_grad_(), [W], [A], [B], [], SEED, [2.0], [0.5]),
            ),
            (operators.lora_linear.default, raw(X, *group_lists(True))),
            (
                operators._lora_linear_backward.default,
                ([GRAD], *raw(X, [W], [A], [B], [BIAS], SEED, [0.5], [0.25], small=small), *ALL),
            ),
            (
                operators._lora_linear_backward.default,
                (
                    [GRAD],
                    *raw(X, [W], [A], [B], [], None, [0.5], small=small),
                    *(False, False, True, False),
                ),
            ),
            (
                operators._lora_linear_backward.default,
                ([GRAD, GRAD], *raw(X, *group_lists(False), small=torch.randn(4, 6)), *ALL),
            ),
        ],
        bad_calls=[
            BadCall(
                lambda: lora_linear([1.0], W, A, B), TypeError, "x must be a torch.Tensor, got list"
            ),
            BadCall(
                lambda: lora_linear(X.double(), W, A, B),
                TypeError,
                "x must be float32, bfloat16 or float16, got float64",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B.int()),
                TypeError,
                "lora_b must be float32, bfloat16 or float16, got int32",
            ),
            BadCall(
                lambda: lora_linear(X, W, None, B),
                TypeError,
                "lora_a must be a torch.Tensor, got NoneType",
            ),
            BadCall(
                lambda: lora_linear(torch.tensor(1.0), W, A, B),
                ValueError,
                "x must have at least one dimension",
            ),
            BadCall(
                lambda: lora_linear(X[:, :7], W, A, B),
                ValueError,
                r"weight must be \[out, 7\] for x \[4, 7\], got \[5, 8\]",
            ),
            BadCall(
                lambda: lora_linear(X, W[0], A, B),
                ValueError,
                r"weight must be \[out, 8\] for x \[4, 8\], got \[8\]",
            ),
            BadCall(
                lambda: lora_linear(X, W, A[:, :7], B),
                ValueError,
                r"lora_a must be \[rank, 8\] with rank > 0 .*, got \[3, 7\]",
            ),
            BadCall(
                lambda: lora_linear(X, W, A[:0], B[:, :0]),
                ValueError,
                r"lora_a must be \[rank, 8\] with rank > 0 .*, got \[0, 8\]",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B.T),
                ValueError,
                r"lora_b must be \[5, 3\], out of weight and rank .*, got \[3, 5\]",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, BIAS[:3]),
                ValueError,
                r"bias must be \[5\], got \[3\]",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, scale="2"),
                TypeError,
                "scale must be a number, got str",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, scale=float("nan")),
                ValueError,
                "scale must be finite in float32, got nan",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, scale=-1e39),
                ValueError,
                r"scale must be finite in float32, got -1e\+39",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, dropout=True),
                TypeError,
                "dropout must be a number, got bool",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, dropout=1.0),
                ValueError,
                "dropout must be at least 0 and below 1, got 1.0",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, dropout=-0.1),
                ValueError,
                "dropout must be at least 0 and below 1, got -0.1",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, seed=5), TypeError, "seed must be a torch.Tensor"
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, seed=SEED.int()),
                TypeError,
                "seed must be int64, got int32",
            ),
            BadCall(
                lambda: lora_linear(X, W, A, B, seed=SEED[0]),
                ValueError,
                r"seed must be \[1\], got \[\]",
            ),
            BadCall(
                lambda: lora_linear(X, *leaves(W), A, B),
                ValueError,
                "weight.requires_grad is True, .* weight.requires_grad_",
            ),
            BadCall(
                lambda: operators.lora_linear(*raw(X, [W], [A], [B], [BIAS[:3]])),
                THROWN,
                "invalid bias",
            ),
            BadCall(
                lambda: operators.lora_linear(*raw(X, [W], [A], [B.T])), THROWN, "invalid lora_b"
            ),
            BadCall(
                lambda: operators.lora_linear(*raw(X, [W], [A], [B], [], None, [1.0], [0.5])),
                THROWN,
                "invalid seed",
            ),
            BadCall(
                lambda: operators.lora_linear(*raw(X, [W], [A], [B], [], SEED, [1.0], [1.5])),
                THROWN,
                "invalid dropout",
            ),
        ],
    )


# ---- values


def plain(x, weight, a, b, bias, scale=1.0, dropout=0.0, seed=None):
    """PEFT's formula, in the adapters' dtype where torch's matrix product wants one."""
    linear = torch.nn.functional.linear
    update = x.to(a.dtype)
    if dropout:
        update = update * keep_mask(seed, x.shape, dropout) / (1 - dropout)
    return (linear(x, weight, bias) + linear(linear(update, a), b) * scale).to(x.dtype)


def errors(actual, exact):
    return [
        ((one.double() - other).norm() / other.norm()).item()
        for one, other in zip(actual, exact, strict=True)
    ]


# Of a result's norm. The longest sum here has 700 terms, taken in blocks of at most 256.
F32_TOLERANCE = 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("rank", [4, 16, 37])
def test_float32_against_float64(rank, dropout):
    tensors = (*inputs((2, 45, 300), 700, rank), torch.randn(2, 45, 700))
    options = {"scale": 2.0, "dropout": dropout, "seed": SEED}
    exact = results(plain, *(tensor.double() for tensor in tensors), **options)
    assert max(errors(results(lora_linear, *tensors, **options), exact)) <= F32_TOLERANCE


@pytest.mark.skipif(devices.runs_cuda_kernels(), reason="CUDA makes all at once")
def test_more_columns_than_are_made_at_a_time():
    """Of y, of x's gradient, and of its sum in a group; the last ones fewer."""
    tensors = (*inputs((30, 2100), 3000, 4), torch.randn(30, 3000))
    exact = results(plain, *(tensor.double() for tensor in tensors))
    assert max(errors(results(lora_linear, *tensors), exact)) <= F32_TOLERANCE
    x, layers, grads = group(width=2100)
    doubles = x.double(), [[t.double() for t in one] for one in layers], [g.double() for g in grads]
    ys, found = group_results(together(SCALES), x, layers, grads)
    exact_ys, exact = group_results(apart(plain, SCALES), *doubles)
    assert max(errors(ys + found, exact_ys + exact)) <= F32_TOLERANCE


@needs_kernels
@pytest.mark.parametrize("rows", [3, 90])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_bfloat16_no_worse_than_torch(adapters, dropout, rows):
    tensors = (
        *inputs((rows, 300), 700, 16, torch.bfloat16, adapters),
        torch.randn(rows, 700).bfloat16(),
    )
    options = {"scale": 2.0, "dropout": dropout, "seed": SEED}
    exact = results(plain, *(tensor.double() for tensor in tensors), **options)
    ours, peer = (
        errors(results(function, *tensors, **options), exact) for function in (lora_linear, plain)
    )
    for k, (error, bound) in enumerate(zip(ours, peer, strict=True)):
        assert error <= max(1.02 * bound, F32_TOLERANCE), (
            f"result {k}: error {error:.3g}, torch's {bound:.3g}"
        )


def test_matches_the_linear_layer_while_b_is_zero():
    torch.testing.assert_close(
        lora_linear(X, W, A, torch.zeros(5, 3), BIAS),
        torch.nn.functional.linear(X, W, BIAS),
        rtol=0,
        atol=0,
    )


def test_tensors_that_begin_in_the_middle_of_memory():
    """Such as the last position of [1, T, width], which generate gives to an output head."""
    tensors = [*inputs((1, 1, 40), 50, 6), torch.randn(1, 1, 50)]
    inside = [
        torch.cat((torch.full_like(tensor, float("nan")), tensor))[len(tensor) :]
        for tensor in tensors
    ]
    assert all(tensor.is_contiguous() and tensor.storage_offset() for tensor in inside)
    close = {"rtol": 1e-5, "atol": 1e-5} if X.is_cuda else {"rtol": 0, "atol": 0}  # cuBLAS
    for got, expected in zip(
        results(lora_linear, *inside), results(lora_linear, *tensors), strict=True
    ):
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_batch_shape_does_not_matter(dtype):
    x, weight, a, b, bias = inputs((2, 3, 40), 50, 6, dtype)
    options = {"dropout": 0.5, "seed": SEED}
    flat = lora_linear(x.view(6, 40), weight, a, b, bias, **options)
    assert torch.equal(lora_linear(x, weight, a, b, bias, **options).view(6, 50), flat)
    one = lora_linear(x[0, 0], weight, a, b, bias, **options)
    assert torch.equal(lora_linear(x[:1, :1], weight, a, b, bias, **options)[0, 0], one)


@needs_kernels
@pytest.mark.parametrize("rows", [3, 150])
def test_the_number_of_threads_does_not_matter(rows):
    """Sizes of several blocks. The weight is zero: torch's product is not what is tested."""
    x, weight, a, b, bias = inputs((rows, 700), 900, 20, torch.bfloat16)
    options = {
        "grad_y": torch.randn(rows, 900).bfloat16(),
        "scale": 2.0,
        "dropout": 0.25,
        "seed": SEED,
    }
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(results(lora_linear, x, torch.zeros_like(weight), a, b, bias, **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(runs[0], run, strict=True))


# ---- dropout


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1, -1, 1 << 40, (1 << 63) - 1, -(1 << 63)])
def test_every_instruction_set_keeps_the_same_elements(seed):
    """With A, B and the gradient identities, y and the gradient of x are the mask itself."""
    seed, unit, zero, x = (
        torch.tensor([seed]),
        torch.eye(37),
        torch.zeros(37, 37),
        torch.ones(50, 37),
    )
    mask = keep_mask(seed, x.shape, 0.3)
    for isa in instruction_sets():
        for rows in (2, 50):
            with instruction_set(isa):
                y, grad_x, *_ = results(
                    lora_linear,
                    x[:rows],
                    zero,
                    unit,
                    unit,
                    zero[0],
                    x[:rows],
                    dropout=0.3,
                    seed=seed,
                )
            for result in (y, grad_x):
                torch.testing.assert_close(result, mask[:rows] / 0.7, msg=isa)


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9])
def test_dropout_is_random(dropout):
    """Shares of 4 standard deviations: of all elements, and of neighbours in a row, in a column and
    in seed that are both kept.
    """

    def check(mask, probability):
        deviation = (probability * (1 - probability) / mask.numel()) ** 0.5
        assert abs(mask.double().mean().item() - probability) < 4 * deviation

    shape = (500, 400)
    for number in (0, 1, 2, 1 << 32, -5):
        mask, other = (
            keep_mask(torch.tensor([number]), shape, dropout),
            keep_mask(torch.tensor([number + 1]), shape, dropout),
        )
        check(mask, 1 - dropout)
        for both in (
            mask[1:] & mask[:-1],
            mask[:, 1:] & mask[:, :-1],
            mask & other,
            mask[:, 256:] & mask[:, :-256],
        ):
            # Pairs overlap, which widens the deviation of their share by less than 1.5.
            share, wanted = both.double().mean().item(), (1 - dropout) ** 2
            assert abs(share - wanted) < 6 * (wanted * (1 - wanted) / both.numel()) ** 0.5


def test_a_seed_of_none_is_drawn_from_the_generator():
    def call():
        return lora_linear(X, W, A, B, dropout=0.5)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and not torch.equal(second, first)


def test_without_dropout_the_generator_is_left_alone():
    own = torch.cuda if X.is_cuda else torch
    state = own.get_rng_state()
    lora_linear(X, W, A, B)
    lora_linear(X, W, A, B, seed=SEED)
    assert torch.equal(own.get_rng_state(), state)


def test_what_is_left_out_may_be_nan():
    mask = keep_mask(SEED, X.shape, 0.5)
    y = lora_linear(
        X.masked_fill(~mask, float("nan")), torch.zeros_like(W), A, B, dropout=0.5, seed=SEED
    )
    assert torch.equal(y.isnan(), ~mask.all(1, keepdim=True).expand_as(y))  # by way of W alone


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_elements(reentrant):
    def gradients(function):
        torch.manual_seed(7)
        tensors = leaves(X, A, B)
        function(*tensors).square().sum().backward()
        return [tensor.grad for tensor in tensors]

    def call(x, a, b):
        return lora_linear(x, W, a, b, dropout=0.5)

    def checkpointed(*tensors):
        return checkpoint(call, *tensors, use_reentrant=reentrant)

    assert all(
        torch.equal(*pair) for pair in zip(gradients(call), gradients(checkpointed), strict=True)
    )


def test_dropout_compiles():
    x, a, b = leaves(X, A, B)
    compiled = torch.compile(
        lambda x, a, b: lora_linear(x, W, a, b, dropout=0.5), fullgraph=True, backend="aot_eager"
    )
    compiled(x, a, b).sum().backward()
    assert all(tensor.grad is not None for tensor in (x, a, b))


# ---- autograd, autocast, devices


def test_frozen_arguments_get_no_gradient():
    for wanted in range(4):
        tensors = [X.clone(), A.clone(), B.clone(), BIAS.clone()]
        tensors[wanted].requires_grad_()
        x, a, b, bias = tensors
        lora_linear(x, W, a, b, bias, dropout=0.5).sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(4)]


def test_a_weight_that_requires_a_gradient_is_taken_where_none_is_recorded():
    (weight,) = leaves(W)
    with torch.no_grad():
        assert torch.equal(lora_linear(X, weight, A, B), lora_linear(X, W, A, B))
    with torch.inference_mode():
        lora_linear(X, weight, A, B)


@needs_kernels
def test_what_is_saved_and_allocated():
    """Saved: the arguments and one float32 [rank] per row. Allocated on the way back: nothing as
    large as the weight or x in float32.
    """
    rows, width, out, rank = 256, 256, 320, 4
    x, weight, a, b, bias = inputs((rows, width), out, rank, torch.bfloat16)
    x, a, b = leaves(x, a, b)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = lora_linear(x, weight, a, b, bias, dropout=0.5, seed=SEED)
    arguments = {tensor.data_ptr() for tensor in (x, weight, a, b, bias, SEED)}
    others = [tensor for tensor in saved if tensor.data_ptr() not in arguments]
    assert [(tensor.shape, tensor.dtype) for tensor in others] == [((rows, rank), torch.float32)]
    grad_y = torch.ones_like(y)
    y.backward(grad_y, retain_graph=True)  # cuBLAS's workspaces stay
    x.grad = a.grad = b.grad = None
    sizes = allocations(lambda: y.backward(grad_y))
    assert max(sizes) == x.numel() * x.element_size()  # the gradient of x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    x, weight, a, b, bias = inputs((6, 40), 50, 4)
    x, a, b = leaves(x.to(dtype), a, b)
    with torch.autocast(X.device.type, torch.bfloat16):
        y = lora_linear(x, weight, a, b, bias)
        y.sum().backward()
    assert (
        y.dtype == torch.bfloat16
        and x.grad.dtype == dtype
        and a.grad.dtype == b.grad.dtype == torch.float32
    )
    assert torch.equal(y, lora_linear(x.bfloat16(), weight, a, b, bias))
    expected = torch.nn.functional.linear(
        x.bfloat16(), (weight + b @ a).bfloat16(), bias.bfloat16()
    )
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_autocast_compiles():
    x, a, b = leaves(X, A, B)
    compiled = torch.compile(
        lambda x, a, b: lora_linear(x, W, a, b), fullgraph=True, backend="aot_eager"
    )
    with torch.autocast(X.device.type, torch.bfloat16):
        y = compiled(x, a, b)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32


def test_meta():
    y = lora_linear(*(tensor.to("meta") for tensor in (X, W, A, B, BIAS)), dropout=0.5)
    assert y.shape == (4, 5) and y.is_meta


def test_inference_mode():
    with torch.inference_mode():
        torch.testing.assert_close(lora_linear(X, W, A, B, BIAS), reference(X, W, A, B, BIAS))


# ---- several layers of one x


def group(dtype=torch.float32, adapters=torch.float32, width=300, shape=(2, 45)):
    """x, layers as lists of tensors with biases, and a gradient for each layer's output."""
    layers = []
    for out, rank in ((700, 16), (96, 4), (130, 9)):
        x, *tensors = inputs((*shape, width), out, rank, dtype, adapters)
        layers.append(tensors)
    return x, layers, [torch.randn(*shape, len(layer[0])).to(dtype) for layer in layers]


def group_results(function, x, layers, grads, wanted=(0, 1, 2)):
    """Outputs and gradients of x and every layer's A, B and bias."""
    (x,) = leaves(x)
    layers = [[weight, *leaves(*others)] for weight, *others in layers]
    ys = function(x, layers)
    needed = [x, *(tensor for _, *others in layers for tensor in others)]
    loss = sum((ys[i] * grads[i]).sum() for i in wanted)
    found = torch.autograd.grad(loss, needed, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in ys], list(found)


def together(options, seeds=None):
    return lambda x, layers: lora_linears(
        x, [LoraLayer(*layer, *one) for layer, one in zip(layers, options, strict=True)], seeds
    )


def apart(function, options, seeds=None):
    def run(x, layers):
        return [
            function(x, *layer, *one, seed=None if seeds is None else seeds[i : i + 1])
            for i, (layer, one) in enumerate(zip(layers, options, strict=True))
        ]

    return run


SCALES = [(2.0, 0.0), (0.5, 0.0), (1.0, 0.0)]
DROPPED = [(2.0, 0.25), (0.5, 0.0), (1.0, 0.5)]


@pytest.mark.parametrize("options", [SCALES, DROPPED], ids=["plain", "dropout"])
def test_a_group_against_float64(options):
    seeds = torch.tensor([3, 4, -5])
    x, layers, grads = group()
    doubles = x.double(), [[t.double() for t in one] for one in layers], [g.double() for g in grads]
    ys, found = group_results(together(options, seeds), x, layers, grads)
    exact_ys, exact = group_results(apart(plain, options, seeds), *doubles)
    assert max(errors(ys + found, exact_ys + exact)) <= F32_TOLERANCE


@needs_kernels
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [SCALES, DROPPED], ids=["plain", "dropout"])
def test_a_group_is_its_layers(options, adapters):
    """All bits but those of x's gradient, which is rounded once for each layer anyway."""
    seeds = torch.tensor([3, 4, -5])
    x, layers, grads = group(torch.bfloat16, adapters)
    ys, found = group_results(together(options, seeds), x, layers, grads)
    alone_ys, alone = group_results(apart(lora_linear, options, seeds), x, layers, grads)
    assert all(map(torch.equal, ys, alone_ys))
    assert all(map(torch.equal, found[1:], alone[1:]))
    doubles = x.double(), [[t.double() for t in one] for one in layers], [g.double() for g in grads]
    exact = group_results(apart(plain, options, seeds), *doubles)[1]
    (ours,), (theirs,) = errors(found[:1], exact[:1]), errors(alone[:1], exact[:1])
    # With dropout each layer's update is rounded, at the size of the sum.
    assert ours <= (1.02 if options is SCALES else 1.2) * theirs


def test_a_layer_that_nothing_came_of_has_no_gradient():
    x, layers, grads = group()
    found = group_results(together(SCALES), x, layers, grads, wanted=(1,))[1]
    expected = group_results(apart(lora_linear, SCALES), x, layers, grads, wanted=(1,))[1]
    torch.testing.assert_close(found, expected)


def test_frozen_layers_of_a_group():
    x, layers, grads = group()
    layers = [LoraLayer(*layer) for layer in layers]
    (a,) = leaves(layers[1].lora_a)
    (b,) = leaves(layers[2].lora_b)
    layers[1], layers[2] = layers[1]._replace(lora_a=a), layers[2]._replace(lora_b=b)
    ys = lora_linears(x, layers)
    found = torch.autograd.grad(ys, (a, b), grads)
    alone = [lora_linear(x, *layer) for layer in layers]
    expected = torch.autograd.grad(alone[1:], (a, b), grads[1:])
    torch.testing.assert_close(found, expected)


@needs_kernels
def test_what_a_group_saves_and_allocates():
    """x once; on the way back one tensor as large as x, its gradient."""
    x, layers, grads = group(torch.bfloat16, width=640, shape=(256,))
    (x,) = leaves(x)
    layers = [LoraLayer(weight, *leaves(a, b), bias) for weight, a, b, bias in layers]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        ys = lora_linears(x, layers)
    arguments = {tensor.data_ptr() for layer in layers for tensor in layer[:4]} | {x.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in arguments]
    assert [tensor.shape for tensor in others] == [(256, 16 + 4 + 9)]
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1
    torch.autograd.backward(ys, grads, retain_graph=True)
    x.grad = None
    for layer in layers:
        layer.lora_a.grad = layer.lora_b.grad = None
    sizes = allocations(lambda: torch.autograd.backward(ys, grads))
    assert sum(size >= x.nbytes for size in sizes) == 1


def test_a_group_compiles():
    x, layers, _ = group()
    (x,) = leaves(x)
    layers = [LoraLayer(weight, *leaves(a, b), bias) for weight, a, b, bias in layers]

    def loss(x):
        return sum(y.square().sum() for y in lora_linears(x, layers))

    expected = torch.autograd.grad(loss(x), (x, layers[0].lora_a))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), (x, layers[0].lora_a)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_group(reentrant):
    x, layers, _ = group()

    def gradients(call):
        torch.manual_seed(7)
        x_, *tensors = leaves(x, *(t for _, *others in layers for t in others))
        call(x_, *tensors).backward()
        return [tensor.grad for tensor in (x_, *tensors)]

    def loss(x, *tensors):
        made = [
            LoraLayer(layer[0], *tensors[3 * i : 3 * i + 3], 2.0, 0.5)
            for i, layer in enumerate(layers)
        ]
        return sum(y.square().sum() for y in lora_linears(x, made))

    def checkpointed(*tensors):
        return checkpoint(loss, *tensors, use_reentrant=reentrant)

    assert all(map(torch.equal, gradients(loss), gradients(checkpointed)))


def test_each_layer_of_a_group_draws_a_mask():
    x, zero = torch.ones(50, 37), torch.zeros(37, 37)
    layer = LoraLayer(zero, torch.eye(37), torch.eye(37), None, 1.0, 0.5)
    first, second = lora_linears(x, [layer, layer])
    assert not torch.equal(first, second)


def test_groups_that_are_refused():
    one = LoraLayer(W, A, B)
    with pytest.raises(ValueError, match="layers must be at least one"):
        lora_linears(X, [])
    with pytest.raises(ValueError, match="bias must be given for all layers or for none"):
        lora_linears(X, [one, one._replace(bias=BIAS)])
    with pytest.raises(TypeError, match="lora_a must have one dtype"):
        lora_linears(X, [one, one._replace(lora_a=A.bfloat16())])
    with pytest.raises(ValueError, match=r"seed must be \[2\], got \[1\]"):
        lora_linears(X, [one, one._replace(dropout=0.5)], SEED)
    with pytest.raises(ValueError, match=r"weight must be \[out, 8\]"):
        lora_linears(X, [one, one._replace(weight=W.T)])
