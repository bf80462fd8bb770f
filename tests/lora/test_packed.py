"""Adapters beside packed weights: by layers, by decode_step, and from files."""

import copy

import pytest
import torch

import mllama
from helpers import counted_steps, decoded, instruction_set, instruction_sets, needs_kernels
from mllama.fusion.base import DecoderInputs, ModelInputs
from mllama.lora.layer import lora_layers
from mllama.model.fast_decoder import FastDecoder
from mllama.nn.kv_cache import KVCache
from mllama.nn.packed import PackedLinear
from mllama.quant.packer import optimize
from mllama.runtime.session import Session
from tiny import pairs

pytestmark = needs_kernels
LENGTH = 6


def filled(model, dtype=torch.float32, names=None, rank=3):
    """The model with adapters that are not zero."""
    mllama.convert_linears_to_lora(model, rank=rank, alpha=6, target_module_names=names)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for part in layer.adapter():
            part.data = (torch.randn(part.shape, generator=generator) / 8).to(dtype)
    return model.eval()


def packed(case, weights="f32"):
    return optimize(copy.deepcopy(pairs.pair(case).ours), weights)


def close(first, second, tolerance=1e-5):
    assert first[0] == second[0]
    assert (first[1] - second[1]).abs().max() <= tolerance * second[1].abs().max()


@pytest.mark.parametrize("case", ["llama", "gemma2", "mllama", "llava, clip, -2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_dense_model(case, dtype):
    inputs = pairs.pair(case).inputs()
    dense = filled(copy.deepcopy(pairs.pair(case).ours), dtype)
    model = filled(packed(case), dtype)
    assert {type(layer.linear) for layer in lora_layers(model.language_model).values()} == {
        PackedLinear
    }
    with torch.no_grad():
        expected = dense(**inputs).logits
        assert (model(**inputs).logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    close(decoded(model, inputs), decoded(model, inputs, fast=False))


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_every_instruction_set_and_rank(rank):
    inputs = pairs.pair("llama").inputs()
    for isa in instruction_sets():
        with instruction_set(isa):
            model = filled(packed("llama", "int8"), rank=rank)
            close(decoded(model, inputs), decoded(model, inputs, fast=False), 3e-2)


def test_some_layers_and_the_head():
    inputs = pairs.pair("llama").inputs()
    for names in (["q_proj", "down_proj"], ["lm_head"], ["v_proj", "up_proj"]):
        model = filled(packed("llama"), names=names)
        if names == ["lm_head"]:
            assert type(model.lm_head) is mllama.Linear_LORA
        close(decoded(model, inputs), decoded(model, inputs, fast=False))


def test_adapters_from_a_file(tmp_path):
    inputs, tuned = pairs.pair("llama").inputs(), filled(copy.deepcopy(pairs.pair("llama").ours))
    for name, options in (("a.safetensors", {}), ("folder", {"format": "peft"})):
        mllama.save_lora(tuned, tmp_path / name, **options)
        model = packed("llama")
        mllama.load_lora(model, tmp_path / name)
        expected = Session(tuned).generate(inputs, max_new_tokens=LENGTH).completions
        assert decoded(model, inputs)[0] == [row.token_ids for row in expected]
    mllama.save_lora(model, tmp_path / "again.safetensors")
    other = packed("llama")
    mllama.load_lora(other, tmp_path / "again.safetensors")
    close(decoded(other, inputs), decoded(model, inputs))


def test_a_session_follows_its_adapters():
    """Attached, switched off and on, replaced, and written in place."""
    inputs, model = pairs.pair("llama").inputs("one row"), packed("llama")
    session, base = Session(model), packed("llama")

    def said():
        return [row.token_ids for row in session.generate(inputs, max_new_tokens=8).completions]

    plain = said()
    filled(model)
    adapted = said()
    assert isinstance(model._fast, FastDecoder)
    assert adapted != plain and adapted == decoded_tokens(model, inputs)
    with mllama.lora_disabled(model):
        assert said() == plain == decoded_tokens(base, inputs)
    assert said() == adapted
    for layer in lora_layers(model).values():
        layer.lora_b.weight.data.mul_(-2)
    session.reset()  # the prompt's keys are of the former values
    assert said() == decoded_tokens(model, inputs) != adapted


def decoded_tokens(model, inputs):
    return [row.token_ids for row in Session(model).generate(inputs, max_new_tokens=8).completions]


def test_a_change_within_an_answer():
    inputs, model = pairs.pair("llama").inputs("one row"), filled(packed("llama"))
    cache = KVCache(model.spec.text.num_hidden_layers)
    with torch.no_grad():
        model.compute(ModelInputs(inputs["input_ids"], cache=cache))
        one = ModelInputs(torch.tensor([[1]]), cache=cache)
        model.compute(one)
        fast = model._fast
        with mllama.lora_disabled(model), counted_steps() as calls:
            assert not fast.is_current
            with pytest.raises(ValueError, match="adapters"):
                fast(DecoderInputs(torch.zeros(1, 1, 64)), cache)
            model.compute(one)
            assert model._fast is not fast and calls.call_count == 2


def test_what_cannot_run_in_one_call_runs_by_layers():
    inputs = pairs.pair("llama").inputs()
    double = filled(packed("llama"), torch.float64, ["q_proj"])
    hooked = filled(packed("llama"), names=["q_proj"])
    next(iter(lora_layers(hooked).values())).lora_a.register_forward_hook(lambda *_: None)
    for model in (double, hooked):
        with counted_steps() as calls:
            Session(model).generate(inputs, max_new_tokens=2)
        assert calls.call_count == 0
