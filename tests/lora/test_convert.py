"""The converters: what they change, what they leave, what they refuse; and the converters that
people write by hand.
"""

import inspect
import warnings

import pytest
import torch
from torch import nn

import mllama
import tiny
from mllama import Linear_LORA, convert_linears_to_lora


class Block(nn.Module):
    """Attention-like, with a norm."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.out_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.out_proj(self.q_proj(self.norm(x)).relu())


class Tied(nn.Module):
    """An embedding whose matrix is the head's too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = Block()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


def stack() -> nn.Sequential:
    return nn.Sequential(Block(), nn.ModuleDict({"inner": Block()})["inner"], nn.Linear(8, 3))


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_signatures():
    assert str(inspect.signature(convert_linears_to_lora)).startswith(
        "(module: torch.nn.modules.module.Module, rank: int = 4, "
    )
    kinds = {
        convert_linears_to_lora: {
            "module": inspect.Parameter.empty,
            "rank": 4,
            "alpha": 16,
            "dropout": 0.0,
            "target_module_classes": (nn.Linear,),
            "target_module_names": None,
        },
        mllama.replace_linear_with_lora: {
            "module": inspect.Parameter.empty,
            "rank": 8,
            "alpha": 32,
            "dropout": 0.0,
            "target_module_names": None,
        },
        mllama.convert_to_lora: dict.fromkeys(
            ("model", "target_modules", "rank", "alpha"), inspect.Parameter.empty
        ),
    }
    for function, wanted in kinds.items():
        found = inspect.signature(function).parameters.values()
        assert {parameter.name: parameter.default for parameter in found} == wanted
        assert [parameter.name for parameter in found] == list(wanted)


def test_everything_linear_is_converted_and_all_else_frozen():
    model, x = stack(), torch.randn(4, 8)
    before, state = (
        model(x).detach(),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    made = convert_linears_to_lora(model)
    assert list(made) == ["0.q_proj", "0.out_proj", "1.q_proj", "1.out_proj", "2"]
    assert all(
        type(layer) is Linear_LORA and model.get_submodule(name) is layer
        for name, layer in made.items()
    )
    assert {(layer.rank, layer.alpha, layer.dropout.p) for layer in made.values()} == {(4, 16, 0.0)}
    assert trainable(model) == {
        f"{name}.{part}.weight" for name in made for part in ("lora_a", "lora_b")
    }
    assert torch.equal(model(x), before) or torch.allclose(model(x), before, rtol=0, atol=1e-6)
    for name, value in model.state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, state[name.replace(".linear", "")]), name
    assert made["0.q_proj"].linear.bias is None and made["0.out_proj"].linear.bias is not None


def test_thirty_steps_of_the_adapters_alone():
    model, x, y = stack(), torch.randn(64, 8), torch.randn(64, 3)
    convert_linears_to_lora(model, rank=2)
    frozen = {
        name: parameter.clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    optimizer = torch.optim.AdamW(
        filter(lambda parameter: parameter.requires_grad, model.parameters()), lr=1e-2
    )
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = dict(model.named_parameters())
    assert all(
        torch.equal(after[name], value) and after[name].grad is None
        for name, value in frozen.items()
    )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_device_and_mode_are_kept_and_adapters_are_float32(kind):
    model = stack().to(kind)
    model[1].eval()
    made = convert_linears_to_lora(model, dropout=0.1)
    assert {layer.linear.weight.dtype for layer in made.values()} == {kind}
    learn = torch.promote_types(kind, torch.float32)  # adapters are not rounded to 16 bits
    assert {parameter.dtype for parameter in mllama.lora_parameters(model)} == {learn}
    assert all(
        layer.training is layer.dropout.training is (name[0] != "1") for name, layer in made.items()
    )
    with torch.device("meta"):
        meta = stack()
    convert_linears_to_lora(meta)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("names", "converted"),
    [
        (["q_proj"], ["0.q_proj", "1.q_proj"]),
        ("q_proj", ["0.q_proj", "1.q_proj"]),
        (("out_proj", "2"), ["0.out_proj", "1.out_proj", "2"]),
        (["1.q_proj"], ["1.q_proj"]),
        ({"0.out_proj", "1.q_proj"}, ["0.out_proj", "1.q_proj"]),
    ],
)
def test_names_are_matched_by_their_end(names, converted):
    model = stack()
    assert list(convert_linears_to_lora(model, target_module_names=names)) == converted
    assert trainable(model) == {
        f"{name}.{part}.weight" for name in converted for part in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize(
    "name", ["proj", "q", "0", "0.", "", "rm", "0.norm", "2.2", ".q_proj", "q_proj."]
)
def test_names_that_fit_nothing(name):
    model = stack()
    before = trainable(model)
    with pytest.raises(ValueError, match=r"out_proj, q_proj"):
        convert_linears_to_lora(model, target_module_names=[name])
    assert (
        not any(isinstance(part, Linear_LORA) for part in model.modules())
        and trainable(model) == before
    )


def test_a_name_that_fits_nothing_beside_others_is_told():
    with pytest.warns(UserWarning, match="k_porj, v_proj.*out_proj, q_proj"):
        made = convert_linears_to_lora(stack(), target_module_names=["q_proj", "k_porj", "v_proj"])
    assert list(made) == ["0.q_proj", "1.q_proj"]


def test_nothing_is_converted_twice():
    model = stack()
    first = convert_linears_to_lora(model, rank=2, target_module_names=["q_proj"])
    weights = [parameter for layer in first.values() for parameter in layer.adapter()]
    second = convert_linears_to_lora(model, rank=3)
    assert list(second) == ["0.out_proj", "1.out_proj", "2"]
    assert all(layer.rank == 2 and type(layer.linear) is nn.Linear for layer in first.values())
    assert all(parameter.requires_grad for parameter in weights)
    with warnings.catch_warnings(action="error"):
        assert (
            convert_linears_to_lora(model)
            == convert_linears_to_lora(model, target_module_names=["q_proj"])
            == {}
        )
        assert convert_linears_to_lora(first["0.q_proj"]) == {}
    assert sum(isinstance(part, Linear_LORA) for part in model.modules()) == 5


def test_an_adapter_that_was_frozen_stays_frozen():
    model = stack()
    convert_linears_to_lora(model, target_module_names="2")
    model.requires_grad_(False)
    convert_linears_to_lora(model, target_module_names="q_proj")
    assert (
        not any(name.startswith("2.") for name in trainable(model)) and len(trainable(model)) == 4
    )


@pytest.mark.parametrize("names", [None, ["first"]])
def test_one_layer_in_several_places_stays_one(names):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "block": Block()})
    model["again"] = model["block"].q_proj = model["first"]
    made = convert_linears_to_lora(model, target_module_names=names)
    assert (
        model["first"]
        is model["again"]
        is model["block"].q_proj
        is made["block.q_proj"]
        is made["first"]
    )
    assert set(made) == {"first", "block.q_proj", "again"} | (
        {"block.out_proj"} if names is None else set()
    )
    assert len(mllama.lora_parameters(model)) == 2 * len(set(made.values()))


def test_a_head_tied_to_the_embedding_is_left_alone():
    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    before = model(ids).detach()
    assert list(convert_linears_to_lora(model)) == ["block.q_proj", "block.out_proj"]
    assert (
        type(model.head) is nn.Linear
        and model.head.weight is model.embed.weight
        and not model.embed.weight.requires_grad
    )
    torch.testing.assert_close(model(ids), before)
    with pytest.raises(ValueError, match="head"):
        convert_linears_to_lora(Tied(), target_module_names=["head"])
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    assert list(convert_linears_to_lora(model, target_module_names=["head"])) == ["head"]


def test_only_tied_layers():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="head"):
        convert_linears_to_lora(model)
    assert model["embed"].weight.requires_grad


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Quantized(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_layers_get_float32_adapters(kind):
    model, x = nn.Sequential(Quantized(8, 8)), torch.randn(3, 8)
    model[0].weight = nn.Parameter(torch.randint(-5, 5, (8, 8)).to(kind), requires_grad=False)
    before = model(x)
    convert_linears_to_lora(model)
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert model[0].lora_b.weight.grad.any() and model[0].lora_b.weight.dtype == torch.float32


def test_subclasses_compute_as_they_did():
    model, x = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    before = model(x).detach()
    assert list(convert_linears_to_lora(model, target_module_classes=Doubling)) == ["0"]
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert model[0].lora_b.weight.grad.any() and list(convert_linears_to_lora(model)) == ["1"]


@pytest.mark.parametrize("build", ["attention", "encoder layer"])
def test_modules_that_read_their_layers_weights(build):
    """nn.MultiheadAttention reads its out_proj's weight, nn.TransformerEncoderLayer without
    gradients those of all its layers.
    """
    torch.manual_seed(0)
    if build == "attention":
        model, call = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            lambda model, x: model(x, x, x)[0],
        )
    else:
        model, call = (
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
            lambda model, x: model(x),
        )
    x = torch.randn(2, 5, 8)
    before = call(model, x).detach()
    made = convert_linears_to_lora(model)
    assert len(made) == (1 if build == "attention" else 3)
    torch.testing.assert_close(call(model, x), before)
    for layer in made.values():
        nn.init.normal_(layer.lora_b.weight)
    call(model, x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in mllama.lora_parameters(model))
    trained = call(model, x).detach()
    assert not torch.allclose(trained, before, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(call(model.eval(), x), trained)
    with mllama.lora_disabled(model), torch.no_grad():
        torch.testing.assert_close(call(model, x), before)
    torch.testing.assert_close(call(mllama.merge_and_unload(model), x), trained)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (
            ValueError,
            "module is itself a Linear, which cannot be replaced in place",
            lambda: convert_linears_to_lora(nn.Linear(3, 3)),
        ),
        (ValueError, "this ReLU has no linear layers", lambda: convert_linears_to_lora(nn.ReLU())),
        (
            ValueError,
            "this Sequential has no linear layers",
            lambda: convert_linears_to_lora(stack(), target_module_classes=Doubling),
        ),
        (TypeError, "torch.nn.Module, got dict", lambda: convert_linears_to_lora({})),
        (ValueError, "rank", lambda: convert_linears_to_lora(stack(), 0)),
        (ValueError, "alpha", lambda: mllama.replace_linear_with_lora(stack(), 4, -1)),
        (
            ValueError,
            "dropout must be",
            lambda: mllama.replace_linear_with_lora(stack(), 4, 4, 1.5),
        ),
        (TypeError, "rank", lambda: mllama.convert_to_lora(stack(), 8, ["q_proj"], 16)),
        (
            ValueError,
            "target_module_names is empty",
            lambda: convert_linears_to_lora(stack(), target_module_names=[]),
        ),
        (
            TypeError,
            "target_module_names",
            lambda: convert_linears_to_lora(stack(), target_module_names=3),
        ),
        (
            TypeError,
            "target_module_names must be",
            lambda: convert_linears_to_lora(stack(), target_module_names=[nn.Linear]),
        ),
        (
            TypeError,
            "target_module_classes",
            lambda: convert_linears_to_lora(stack(), 4, 4, 0.0, (nn.Conv2d,)),
        ),
        (
            TypeError,
            "target_module_classes",
            lambda: convert_linears_to_lora(stack(), 4, 4, 0.0, ["q_proj"]),
        ),
        (
            TypeError,
            "target_module_classes",
            lambda: convert_linears_to_lora(stack(), 4, 4, 0.0, ()),
        ),
    ],
)
def test_what_is_refused(error, named, call):
    with pytest.raises(error, match=named):
        call()


def test_the_other_two_have_orders_and_defaults_of_their_own():
    model = stack()
    assert {
        (layer.rank, layer.alpha, layer.dropout.p)
        for layer in mllama.replace_linear_with_lora(model).values()
    } == {(8, 32, 0.0)}
    made = mllama.replace_linear_with_lora(stack(), 2, 3, 0.5, ["q_proj"])
    assert {(name, layer.rank, layer.alpha, layer.dropout.p) for name, layer in made.items()} == {
        ("0.q_proj", 2, 3, 0.5),
        ("1.q_proj", 2, 3, 0.5),
    }
    model = stack()
    assert mllama.convert_to_lora(model, ["out_proj"], 2, 6) is model
    assert (model[0].out_proj.rank, model[0].out_proj.alpha) == (2, 6) and type(
        model[0].q_proj
    ) is nn.Linear


def by_children(module, rank=4, alpha=16, dropout=0.0, target_module_classes=(nn.Linear,)):
    for name, child in module.named_children():
        if isinstance(child, target_module_classes):
            lora = Linear_LORA(
                child.in_features, child.out_features, rank=rank, alpha=alpha, dropout=dropout
            )
            lora.linear.weight.data.copy_(child.weight.data)
            setattr(module, name, lora)
        else:
            by_children(child, rank, alpha, dropout, target_module_classes)


def by_names(model, rank=8, alpha=16, dropout=0.1):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(
            target in name for target in ("q_proj", "v_proj", "o_proj")
        ):
            path, child = name.rsplit(".", 1)
            lora = Linear_LORA(
                in_dim=module.in_features,
                out_dim=module.out_features,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
            )
            lora.linear.weight.data.copy_(module.weight.data)
            setattr(dict(model.named_modules())[path], child, lora)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad = False
    return model


@pytest.mark.parametrize("convert", [by_children, by_names])
def test_converters_written_by_hand(convert):
    model, ids = tiny.model(), torch.tensor([tiny.tokens(6)])
    before = model(ids).logits
    convert(model.language_model)
    torch.testing.assert_close(model(ids).logits, before)
    adapters = [
        parameter for name, parameter in model.language_model.named_parameters() if "lora" in name
    ]
    assert all(parameter.requires_grad for parameter in adapters)
    assert len(adapters) == 2 * 2 * (7 if convert is by_children else 3)
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapters)
    assert not any(
        "linear.weight" in name and parameter.grad is not None
        for name, parameter in model.named_parameters()
    )
    assert len(mllama.lora_parameters(model)) == len(adapters)
    again = convert_linears_to_lora(model.language_model)  # ours goes on from there
    assert len(again) == (0 if convert is by_children else 2 * 4)


def test_a_converter_by_hand_that_runs_twice_adapts_adapters():
    model, x = stack(), torch.randn(3, 8)
    by_children(model)
    before = model(x)
    by_children(model)
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert model[2].linear.lora_b.weight.grad.any()
    assert convert_linears_to_lora(model) == {}
    with pytest.raises(ValueError, match="its linear, a Linear_LORA,"):
        mllama.merge_lora(model)
