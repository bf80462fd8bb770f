"""The adapters of a model: its parameters, the switch, merging and back."""

import threading

import pytest
import torch
from torch import nn

import mllama
import tiny
from mllama import Linear_LORA


def base(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """What the model computes without its adapters."""
    for part in model:
        x = (part.linear if isinstance(part, Linear_LORA) else part)(x)
    return x


def test_parameters_are_the_adapters_alone(converted):
    model = converted()
    assert mllama.lora_parameters(model) == [
        model[i].get_submodule(part).weight for i in (0, 4) for part in ("lora_a", "lora_b")
    ]
    model[4].lora_a.weight = nn.Parameter(torch.zeros(4, 9))
    model[0].lora_b.weight = model[4].lora_b.weight  # one adapter's part in two layers
    assert len(mllama.lora_parameters(model)) == 3
    assert mllama.lora_parameters(model[4]) == [model[4].lora_a.weight, model[4].lora_b.weight]


def test_switched_off_and_on(converted):
    model, x = converted(), torch.randn(5, 6)
    adapted = model(x)
    with mllama.lora_disabled(model):
        torch.testing.assert_close(model(x), base(model, x))
        assert "disabled" in repr(model)
        with mllama.lora_disabled(model[4]), mllama.lora_disabled(model):
            torch.testing.assert_close(model(x), base(model, x))
        torch.testing.assert_close(model(x), base(model, x))
        model.train()(x)
    assert torch.equal(model.eval()(x), adapted) and "disabled" not in repr(model)


def test_an_error_inside_switches_them_on_again(converted):
    model, x = converted(), torch.randn(5, 6)
    adapted = model(x)
    with pytest.raises(RuntimeError, match="inside"), mllama.lora_disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), adapted)


def test_what_was_off_before_stays_off(converted):
    model, x = converted(), torch.randn(5, 6)
    model[0].enabled = False
    half = model(x)
    with mllama.lora_disabled(model):
        torch.testing.assert_close(model(x), base(model, x))
    assert torch.equal(model(x), half) and not model[0].enabled


def test_other_threads_see_the_switch(converted):
    model, x, seen = converted(), torch.randn(5, 6), []
    with mllama.lora_disabled(model):
        thread = threading.Thread(target=lambda: seen.append(model(x)))
        thread.start()
        thread.join()
    torch.testing.assert_close(seen[0], base(model, x))


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
)
def test_merged_and_back(converted, kind, tolerance):
    model, x = converted().to(kind), torch.randn(50, 6, dtype=kind)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = model(x)
    mllama.merge_lora(model)
    assert model[0].merged_weight.dtype == kind
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=tolerance)
    mllama.unmerge_lora(model)
    assert torch.equal(model(x), adapted)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()), (
        "not bit for bit"
    )


@pytest.mark.parametrize("merge", [mllama.merge_lora, mllama.merge_and_unload])
@torch.no_grad()
def test_sums_that_float16_cannot_hold_are_refused(converted, merge):
    model = converted().half()
    last = model[4]
    last.lora_a.weight.zero_()[0, 0] = 256
    last.lora_b.weight.zero_()[1, 0] = 256 / last.scale  # their product is 65536
    last.linear.weight[1, 0] = 0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^4.weight with its adapter merged .*65504.*bfloat16"):
        merge(model)
    assert model[4] is last and last.merged_weight is None and model[0].merged_weight is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    last.linear.weight[1, 0] = -32
    last.linear.weight[0, 0] = torch.inf  # the model's own
    merge(model)
    merged = model[4].weight[:2, 0]
    assert merged.tolist() == [torch.inf, 65504]


def test_merging_again_and_unmerging_again(converted):
    model, x = converted(), torch.randn(5, 6)
    mllama.unmerge_lora(model)
    mllama.merge_lora(model)
    nn.init.normal_(model[0].lora_b.weight)
    mllama.merge_lora(model)
    merged = model(x)
    mllama.unmerge_lora(model)
    mllama.unmerge_lora(model)
    torch.testing.assert_close(merged, model(x), rtol=0, atol=1e-5)


def test_an_interrupt_of_merging_for_good_leaves_every_update_once(converted, monkeypatch):
    model, x = converted(), torch.randn(5, 6)
    nn.init.normal_(model[0].lora_b.weight)
    adapted, unload = model(x), Linear_LORA.unload
    first = model[0]

    def interrupted(layer):
        if layer is not first:
            raise KeyboardInterrupt
        return unload(layer)

    monkeypatch.setattr(Linear_LORA, "unload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mllama.merge_and_unload(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)


def test_a_merged_model_is_not_trained(converted):
    model, x = converted(), torch.randn(5, 6)
    mllama.merge_lora(model)
    with pytest.raises(ValueError, match=r"unmerge_lora"):
        model.train()(x)
    with torch.no_grad():
        model(x)
    mllama.unmerge_lora(model)
    model(x).sum().backward()


def test_merged_and_switched_off(converted):
    model, x = converted(), torch.randn(5, 6)
    mllama.merge_lora(model)
    merged = model(x)
    with mllama.lora_disabled(model):
        torch.testing.assert_close(model(x), base(model, x))
        mllama.merge_lora(model)
    assert torch.equal(model(x), merged)


def test_a_merged_models_state_is_as_before(converted):
    model, again, x = converted(), converted(seed=1), torch.randn(5, 6)
    names, adapted = list(model.state_dict()), model(x)
    mllama.merge_lora(model)
    mllama.merge_lora(again)
    assert list(model.state_dict()) == names
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), adapted)  # not what was merged before


def test_unloading_leaves_plain_layers(converted):
    model, x = converted(), torch.randn(5, 6)
    adapted, first, bias = model(x), model[0].linear, model[0].linear.bias
    mllama.merge_lora(model)
    assert mllama.merge_and_unload(model) is model
    assert [type(part) for part in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert model[0] is first and first.bias is bias
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"]
    assert list(mllama.convert_linears_to_lora(model)) == ["0", "2", "4"]


def test_unloading_inside_the_switch_adds_the_adapters(converted):
    model, x = converted(), torch.randn(5, 6)
    adapted = model(x)
    with mllama.lora_disabled(model):
        mllama.merge_and_unload(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)


def test_unloading_a_lone_layer_and_one_in_two_places(converted):
    layer, x = converted()[0], torch.randn(5, 6)
    model = nn.ModuleDict({"first": layer, "again": layer})
    adapted = layer(x)
    mllama.merge_and_unload(model)
    assert model["first"] is model["again"] is layer.linear
    torch.testing.assert_close(model["first"](x), adapted, rtol=0, atol=1e-5)
    lone = converted()[0]
    assert mllama.merge_and_unload(lone) is lone.linear


def test_unloading_keeps_a_shared_weight_for_its_other_owner(converted):
    layer = converted()[4]
    embedding = nn.Embedding(4, 9)
    embedding.weight = layer.linear.weight
    before = embedding.weight.clone()
    plain = mllama.merge_and_unload(nn.ModuleDict({"embedding": embedding, "head": layer}))["head"]
    assert torch.equal(embedding.weight, before) and not torch.allclose(plain.weight, before)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", [mllama.merge_lora, mllama.merge_and_unload])
def test_layers_that_compute_in_a_way_of_their_own_are_not_merged(converted, change):
    model = converted()
    model[4].linear = Doubling(9, 4, bias=False)
    with pytest.raises(ValueError, match="4.*Doubling"):
        change(model)
    assert model[0].merged_weight is None and isinstance(model[0], Linear_LORA)


@pytest.mark.parametrize(
    "call",
    [
        mllama.lora_parameters,
        mllama.merge_lora,
        mllama.unmerge_lora,
        mllama.merge_and_unload,
        lambda model: mllama.lora_disabled(model).__enter__(),
        lambda model: mllama.save_lora(model, "adapters.safetensors"),
    ],
)
def test_models_without_adapters(call):
    with pytest.raises(ValueError, match=r"convert_linears_to_lora"):
        call(tiny.model())
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        call("model")
