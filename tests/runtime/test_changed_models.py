"""Sessions notice what changes a model beside its weights, without a reset."""

import peft
import pytest
import torch
from torch import nn

import tiny
from mllama.runtime.session import Session
from runtime.test_images import logits, model_of, prompts, same_bits


@pytest.fixture
def asked():
    """A model, a prompt with an image, and a session."""
    model = model_of("merge")
    return model, prompts("merge", model, (tiny.tokens(9), 1)), Session(model)


PARTS = pytest.mark.parametrize("part", ["language_model", "vision_tower.encoder"])


@PARTS
def test_hooks(part, asked):
    model, inputs, session = asked
    mlp = model.get_submodule(f"{part}.layers.0.mlp")
    answers = [logits(session, inputs)]
    for factor in (2, 3):
        hook = mlp.register_forward_hook(lambda *call, factor=factor: call[-1] * factor)
        answers.append(logits(session, inputs))
        assert same_bits(answers[-1], logits(Session(model), inputs))
        assert not same_bits(answers[-1], answers[-2])
        hook.remove()
    assert same_bits(logits(session, inputs), answers[0])


@PARTS
def test_hooks_of_all_modules_and_other_classes(part, asked):
    model, inputs, session = asked
    mlp = model.get_submodule(f"{part}.layers.0.mlp")
    plain = logits(session, inputs)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if module is mlp else None
    )
    doubled = logits(session, inputs)
    hook.remove()
    assert not same_bits(doubled, plain) and same_bits(logits(session, inputs), plain)

    class Doubled(type(mlp)):
        def forward(self, x):
            return super().forward(x) * 2

    mlp.__class__ = Doubled
    assert same_bits(logits(session, inputs), doubled)


def test_autocast_and_another_dtype(asked):
    model, inputs, session = asked
    plain = logits(session, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(session, inputs)
        assert same_bits(cast, logits(Session(model), inputs)) and not same_bits(cast, plain)
    assert same_bits(logits(session, inputs), plain)
    model.bfloat16()
    assert same_bits(logits(session, inputs), logits(Session(model), inputs))


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_adapters_of_peft(part, asked):
    model, inputs, session = asked
    plain = logits(session, inputs)
    targets = f".*{part}.*(q_proj|v_proj)"
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    adapted = logits(session, inputs)
    assert same_bits(adapted, logits(Session(model), inputs)) and not same_bits(adapted, plain)
    with wrapped.disable_adapter():
        assert same_bits(logits(session, inputs), plain)
    assert same_bits(logits(session, inputs), adapted)
    wrapped.unload()
    assert same_bits(logits(session, inputs), plain)
