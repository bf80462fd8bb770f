"""PEFT as the oracle: the same A and B give the same outputs and gradients."""

import pytest
import torch
from torch import nn

import mllama
import tiny
from mllama import Linear_LORA

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "o_proj", "down_proj"]


def test_a_layer():
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 9)), peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5)
    )
    lora = theirs.base_model.model[0]
    ours = Linear_LORA(12, 9, 3, 5, 0.0, bias=True)
    nn.init.normal_(lora.lora_B["default"].weight)
    pairs = [
        (ours.linear, lora.base_layer),
        (ours.lora_a, lora.lora_A["default"]),
        (ours.lora_b, lora.lora_B["default"]),
    ]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    x, y = (
        torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2)
    )
    torch.testing.assert_close(ours(x), theirs(y))
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for mine, other in pairs[1:]:
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-5, atol=1e-4)
    ours.merge()
    lora.merge()
    torch.testing.assert_close(ours.merged_weight, lora.base_layer.weight)


def test_a_model_and_its_adapters():
    theirs = peft.get_peft_model(
        tiny.model(),
        peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=16, init_lora_weights=False),
    )
    ours = tiny.model()
    made = mllama.convert_linears_to_lora(ours, target_module_names=TARGETS)
    state = peft.get_peft_model_state_dict(theirs)
    assert len(state) == 2 * len(made)
    with torch.no_grad():
        for name, layer in made.items():
            layer.lora_a.weight.copy_(state[f"base_model.model.{name}.lora_A.weight"])
            layer.lora_b.weight.copy_(state[f"base_model.model.{name}.lora_B.weight"])
    inputs = tiny.batch([tiny.IMAGE] * tiny.PATCHES + tiny.tokens(5)) | {
        "pixel_values": tiny.images(1)
    }
    outputs = [model.train()(**inputs, labels=inputs["input_ids"]) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, layer in made.items():
        torch.testing.assert_close(
            layer.lora_a.weight.grad, gradients[f"base_model.model.{name}.lora_A.default.weight"]
        )
        torch.testing.assert_close(
            layer.lora_b.weight.grad, gradients[f"base_model.model.{name}.lora_B.default.weight"]
        )
    with torch.no_grad(), mllama.lora_disabled(ours), theirs.disable_adapter():
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)


def test_peft_around_a_layer_of_ours():
    model, ids = tiny.model(), torch.tensor([tiny.tokens(4)])
    mllama.convert_linears_to_lora(model.language_model, target_module_names=["q_proj"])
    with torch.no_grad():
        before = model(ids).logits
        both = peft.get_peft_model(
            model,
            peft.LoraConfig(
                target_modules=r".*language_model.*q_proj\.linear", r=2, init_lora_weights=False
            ),
        )
        assert not torch.allclose(both(ids).logits, before, atol=1e-3)
        with both.disable_adapter():
            torch.testing.assert_close(both(ids).logits, before)
