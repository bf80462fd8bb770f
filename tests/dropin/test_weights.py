"""`assign` and `load_weights_into_llama`."""

import inspect

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mllama
from dropin import toys
from dropin.toys import CFG, ids
from mllama.dropin.model import Llama3Model, assign, convert_to_lora, load_weights_into_llama


def test_assign():
    assert inspect.signature(assign).parameters["tensor_name"].default == "unknown"
    left = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    for right in (
        torch.ones(2, 3),
        np.ones((2, 3)),
        [[1.0] * 3] * 2,
        nn.Parameter(torch.ones(2, 3, dtype=torch.float16)),
    ):
        made = assign(left, right, "a name")
        assert (
            isinstance(made, nn.Parameter)
            and made.dtype == torch.bfloat16
            and made.requires_grad
            and made.eq(1).all()
        )


def test_assign_does_not_share_memory():
    right = torch.ones(3)
    made = assign(torch.zeros(3), right)
    right.zero_()
    assert made.eq(1).all() and made.is_leaf


def test_assign_from_the_meta_device_takes_the_values_device():
    assert (
        assign(torch.empty(3, device="meta", dtype=torch.float16), torch.ones(3)).device.type
        == "cpu"
    )


def test_assign_names_the_tensor_and_both_shapes():
    with pytest.raises(
        ValueError, match=r"'a\.weight' must be \[2, 3\], as the model's, got \[3, 2\]"
    ):
        assign(torch.zeros(2, 3), torch.zeros(3, 2), "a.weight")
    with pytest.raises(ValueError, match="'unknown'"):
        assign(torch.zeros(2), np.zeros(3))


def test_from_a_file_of_stock_transformers(tmp_path):
    stock = toys.stock()
    stock.save_pretrained(tmp_path)
    model = Llama3Model(CFG | {"dtype": torch.bfloat16})
    load_weights_into_llama(model, CFG, load_file(tmp_path / "model.safetensors"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = stock.bfloat16().state_dict()
    assert torch.equal(
        model.trf_blocks[1].ff.fc2.weight, expected["model.layers.1.mlp.up_proj.weight"]
    )


def test_the_head_falls_back_to_the_embedding():
    params = toys.stock().state_dict()
    del params["lm_head.weight"]
    model = Llama3Model(CFG)
    load_weights_into_llama(model, CFG, params)
    assert (
        torch.equal(model.out_head.weight, model.tok_emb.weight)
        and model.out_head.weight is not model.tok_emb.weight
    )


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = Llama3Model(CFG)
    load_weights_into_llama(model, CFG, toys.stock().state_dict())
    torch.testing.assert_close(model(ids()), toys.by_dict()(ids()), rtol=0, atol=0)
    assert torch.equal(model.cos, toys.by_dict().cos)


def test_beneath_lora():
    model = Llama3Model(CFG).eval()
    convert_to_lora(model, ["W_query", "fc3", "out_head"], 4, 8)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    mllama.merge_lora(model)
    load_weights_into_llama(model, CFG, toys.stock().state_dict())
    torch.testing.assert_close(model(ids()), toys.by_dict()(ids()), rtol=0, atol=1e-5)
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == trained


def changed(params, **changes):
    return {name: value for name, value in (params | changes).items() if value is not None}


@pytest.mark.parametrize(
    "cfg, changes, words",
    [
        (CFG, {"model.norm.weight": None}, "missing model.norm.weight, of 21 tensors"),
        (
            CFG,
            {f"model.layers.1.self_attn.{x}_proj.weight": None for x in "qkvo"}
            | {"model.norm.weight": None},
            "missing .*q_proj",
        ),
        (
            CFG,
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)},
            r"'model.layers.0.mlp.up_proj.weight' must be \[96, 64\]",
        ),
        ({}, {}, "n_layers must be 2, as the model's, got None"),
        (CFG | {"n_layers": 3}, {}, "n_layers must be 2, as the model's, got 3"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(cfg, changes, words):
    model = Llama3Model(CFG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_weights_into_llama(model, cfg, changed(toys.stock().state_dict(), **changes))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tensors_without_a_place_are_named():
    with pytest.warns(
        UserWarning, match="1 tensors have no place in the model, 'model.layers.2.x' for one"
    ):
        load_weights_into_llama(
            Llama3Model(CFG), CFG, toys.stock().state_dict() | {"model.layers.2.x": torch.zeros(1)}
        )


def test_a_model_without_a_head_is_refused():
    for model in (toys.by_config().model, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="must be a Llama3Model of a dict"):
            load_weights_into_llama(model, CFG, toys.stock().state_dict())
