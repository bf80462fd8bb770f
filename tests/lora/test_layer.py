"""`Linear_LORA` against the formula, under the treatment that layers get, and what it refuses."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from mllama import Linear_LORA


def layer(
    rank: int = 3,
    alpha: float = 6,
    dropout: float = 0.0,
    bias: bool = False,
    sizes: tuple[int, int] = (10, 7),
) -> Linear_LORA:
    """A layer whose adapter says something."""
    made = Linear_LORA(*sizes, rank, alpha, dropout, bias)
    nn.init.normal_(made.lora_b.weight)
    return made


def formula(made: Linear_LORA, x: torch.Tensor) -> torch.Tensor:
    bias = 0 if made.linear.bias is None else made.linear.bias
    return (
        x @ made.linear.weight.T
        + bias
        + made.alpha / made.rank * (x @ made.lora_a.weight.T @ made.lora_b.weight.T)
    )


def test_the_signature():
    assert (
        str(inspect.signature(Linear_LORA))
        == "(in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float, "
        "bias: bool = False)"
    )
    made = Linear_LORA(in_dim=10, out_dim=7, rank=3, alpha=6, dropout=0.25)
    assert (made.rank, made.alpha, made.scale, made.dropout.p) == (3, 6, 2.0, 0.25)
    assert (made.in_features, made.out_features, made.linear.bias) == (10, 7, None)
    assert {name: list(value.shape) for name, value in made.state_dict().items()} == {
        "linear.weight": [7, 10],
        "lora_a.weight": [3, 10],
        "lora_b.weight": [7, 3],
    }
    assert [name for name, parameter in made.named_parameters() if parameter.requires_grad] == [
        "lora_a.weight",
        "lora_b.weight",
    ]
    assert "rank=3, alpha=6" in repr(made) and "merged" not in repr(made)


def test_a_new_layer_computes_what_its_linear_does():
    torch.manual_seed(3)
    made = Linear_LORA(200, 50, 4, 16, 0.0, bias=True)
    torch.manual_seed(3)
    plain = nn.Linear(200, 50)
    assert torch.equal(made.linear.weight, plain.weight) and not made.linear.bias.requires_grad
    x = torch.randn(2, 5, 200)
    torch.testing.assert_close(made(x), plain(x))
    assert not made.lora_b.weight.any()
    bound = 200**-0.5  # Kaiming's, uniform, with a = sqrt(5)
    assert 0.9 * bound < made.lora_a.weight.abs().max() <= bound


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients(kind, bias):
    made = layer(bias=bias).to(kind)
    exact = copy.deepcopy(made).double()
    x = torch.randn(4, 6, 10, dtype=kind, requires_grad=True)
    y = x.detach().double().requires_grad_()
    out, expected = made(x), formula(exact, y)
    assert out.dtype == kind
    seed = torch.randn(4, 6, 7).to(kind)
    out.backward(seed)
    expected.backward(seed.double())
    tolerance = {
        torch.float32: 1e-5,
        torch.float64: 1e-12,
        torch.bfloat16: 4e-2,
        torch.float16: 5e-3,
    }[kind]
    adapters = [
        (mine.grad, theirs.grad)
        for mine, theirs in zip(made.adapter(), exact.adapter(), strict=True)
    ]
    for got, wanted in ((out, expected), (x.grad, y.grad), *adapters):
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert made.linear.weight.grad is None


def test_float32_adapters_beside_sixteen_bit_weights():
    made = layer().bfloat16()
    for parameter in made.adapter():
        parameter.data = parameter.data.float()
    x = torch.randn(8, 10)
    out = made(x.bfloat16())
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and {
        parameter.grad.dtype for parameter in made.adapter()
    } == {torch.float32}
    torch.testing.assert_close(out.float(), formula(made.float(), x), rtol=0.05, atol=0.05)


def test_dropout_is_for_the_update_in_training():
    made = layer(dropout=0.5, sizes=(64, 7))
    x = torch.randn(300, 64)
    frozen, whole = made.linear(x), formula(made, x)
    torch.testing.assert_close(made.eval()(x), whole)
    dropped = made.train()(x)
    assert not torch.allclose(dropped, made(x)), "the same elements twice"
    mean = torch.stack([made(x) for _ in range(400)]).mean(0)
    assert (mean - whole).abs().mean() < 0.2 * (dropped - whole).abs().mean()
    torch.manual_seed(5)
    first = made(x)
    torch.manual_seed(5)
    assert torch.equal(made(x), first)
    made.dropout.eval()  # as scripts that silence every nn.Dropout do
    torch.testing.assert_close(made(x), whole)
    nn.init.zeros_(made.lora_b.weight)
    torch.testing.assert_close(made.train()(x), frozen)


def test_the_gradient_of_dropout_is_that_of_the_same_elements():
    made = layer(dropout=0.5)
    x = torch.randn(20, 10, requires_grad=True)

    def loss(inputs):
        torch.manual_seed(1)
        return made(inputs).square().sum()

    loss(x).backward()
    direction = torch.randn_like(x)
    with torch.no_grad():
        slope = (loss(x + 1e-2 * direction) - loss(x - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-3, atol=1e-2)


def test_under_autocast():
    made = layer()
    x = torch.randn(5, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
        assert out.dtype == made.linear(x).dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), formula(made, x), rtol=0.05, atol=0.05)
    assert x.grad.dtype == torch.float32 and {
        parameter.grad.dtype for parameter in made.adapter()
    } == {torch.float32}


def test_hand_copied_weights_count():
    made, plain, x = layer(), nn.Linear(10, 7, bias=False), torch.randn(2, 10)
    made.linear.weight.data.copy_(plain.weight.data)
    nn.init.zeros_(made.lora_b.weight)
    torch.testing.assert_close(made(x), plain(x))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_replaced_children_compute():
    x = torch.randn(4, 10)
    for child in ("linear", "lora_a", "lora_b"):
        made = layer(bias=True)
        before = copy.deepcopy(made)
        doubling = Doubling(
            getattr(made, child).in_features,
            getattr(made, child).out_features,
            bias=child == "linear",
        )
        doubling.load_state_dict(getattr(made, child).state_dict())
        setattr(made, child, doubling)
        frozen = before.linear(x)
        wanted = (
            2 * frozen + (before(x) - frozen)
            if child == "linear"
            else frozen + 2 * (before(x) - frozen)
        )
        torch.testing.assert_close(made(x), wanted)
        with pytest.raises(ValueError, match=f"{child}, a Doubling"):
            made.merge()
    made.lora_a, made.lora_b = nn.Linear(10, 5, bias=False), nn.Linear(5, 7, bias=False)
    assert made(x).shape == (4, 7)


def test_an_unfrozen_weight_learns():
    made = layer()
    made.requires_grad_(True)
    x = torch.randn(3, 10)
    out = made(x)
    torch.testing.assert_close(out, formula(made, x))
    out.sum().backward()
    torch.testing.assert_close(made.linear.weight.grad, x.sum(0).expand(7, 10))


@pytest.mark.parametrize("child", ["linear", "lora_a", "lora_b"])
def test_hooks_of_children_are_called(child):
    made, seen, x = layer(), [], torch.randn(3, 10, requires_grad=True)
    expected = made(x)
    getattr(made, child).register_forward_hook(
        lambda module, inputs, output: seen.append("forward")
    )
    getattr(made, child).register_full_backward_hook(
        lambda module, inputs, output: seen.append("backward")
    )
    out = made(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert seen == ["forward", "backward"]
    with pytest.raises(ValueError, match=f"{child}.*hooks"):
        made.merge()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_compiles_in_one_graph(dropout):
    made, x = layer(dropout=dropout), torch.randn(4, 10)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.isfinite(compiled(x)).all()
    made.eval()
    torch.testing.assert_close(compiled(x), made(x))
    made.train()
    compiled(x).sum().backward()
    assert all(parameter.grad.any() for parameter in made.adapter())
    made.eval().merge()
    torch.testing.assert_close(compiled(x), formula(made, x))
    made.enabled = False
    torch.testing.assert_close(compiled(x), made.linear(x))


def test_copies_and_moves():
    made, x = layer(), torch.randn(2, 10)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x), made(x))
        nn.init.zeros_(again.lora_a.weight)
        assert not torch.equal(again(x), made(x))
    assert made.to("meta")(x.to("meta")).shape == (2, 7)


def test_merging_adds_the_update_once():
    made, x = layer(bias=True).eval(), torch.randn(5, 10)
    expected, weight = made(x), made.linear.weight.clone()
    made.merge()
    assert "merged" in repr(made) and torch.equal(made.linear.weight, weight)
    torch.testing.assert_close(
        made.merged_weight, weight + 2 * made.lora_b.weight @ made.lora_a.weight, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-5)
    assert list(made.state_dict()) == list(layer(bias=True).state_dict())
    assert made.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    made.unmerge()
    assert made.merged_weight is None and torch.equal(made.linear.weight, weight.bfloat16())


def test_the_weight_that_a_layer_amounts_to():
    made = layer(bias=True)
    wanted = made.linear.weight + 2 * made.lora_b.weight @ made.lora_a.weight
    torch.testing.assert_close(made.weight, wanted)
    assert made.bias is made.linear.bias
    made.weight.square().sum().backward()
    got = [parameter.grad.clone() for parameter in made.adapter()]
    made.zero_grad()
    wanted.square().sum().backward()
    for one, parameter in zip(got, made.adapter(), strict=True):
        torch.testing.assert_close(one, parameter.grad)
    made.enabled = False
    assert made.weight is made.linear.weight
    with pytest.raises(KeyError, match="weight"):
        made.weight = nn.Parameter(torch.zeros(7, 10))


def test_weights_of_a_plain_layer_are_loaded_as_the_frozen_ones():
    made, plain = layer(bias=True).eval(), nn.Linear(10, 7)
    made.merge()
    report = made.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys == ["lora_a.weight", "lora_b.weight"] and not report.unexpected_keys
    assert (
        made.merged_weight is None
        and torch.equal(made.linear.weight, plain.weight)
        and torch.equal(made.linear.bias, plain.bias)
    )
    with pytest.raises(RuntimeError, match="lora_a.weight"):
        nn.Sequential(made).load_state_dict(nn.Sequential(plain).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*weights"):
        made.load_state_dict(made.state_dict() | {"weights": plain.weight})


@pytest.mark.parametrize(
    ("error", "named", "changed"),
    [
        (ValueError, "rank", {"rank": 0}),
        (TypeError, "rank", {"rank": 4.0}),
        (TypeError, "rank", {"rank": True}),
        (ValueError, "alpha", {"alpha": 0}),
        (ValueError, "alpha", {"alpha": float("nan")}),
        (ValueError, "alpha", {"alpha": float("inf")}),
        (TypeError, "alpha", {"alpha": "16"}),
        (ValueError, "dropout", {"dropout": 1.0}),
        (ValueError, "dropout", {"dropout": -0.1}),
        (TypeError, "dropout", {"dropout": nn.Dropout(0.1)}),
        (ValueError, "in_dim", {"in_dim": 0}),
        (TypeError, "out_dim", {"out_dim": "7"}),
    ],
)
def test_numbers_that_cannot_be(error, named, changed):
    with pytest.raises(error, match=named):
        Linear_LORA(**{"in_dim": 10, "out_dim": 7, "rank": 3, "alpha": 6, "dropout": 0.0} | changed)


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="lora_linear: weight"):
        layer()(torch.zeros(2, 11))
