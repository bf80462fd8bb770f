"""mllama.adapt: what it adapts, freezes, prints and returns."""

import math

import pytest
import torch

import mllama
import tiny
from tiny.pairs import FAMILIES, make, pair


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("case", FAMILIES)
def test_the_decoder_of_every_family(case, capsys):
    model, inputs = make(case).ours, pair(case).inputs("one row")
    with torch.no_grad():
        before = model(**inputs).logits
    adapted = mllama.adapt(model, rank=4)
    assert capsys.readouterr().err == f"{adapted}\n"
    assert {name.split(".")[0] for name in adapted.names} == {"language_model"}
    assert {name.rpartition(".lora_")[0] for name in trained(model)} == set(adapted.names)
    assert (
        adapted.num_parameters
        == adapted.num_trained
        == sum(parameter.numel() for parameter in mllama.lora_parameters(model))
    )
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(
        layer.lora_b.weight.grad.any()
        for name, layer in adapted.layers.items()
        if ".cross_attn." not in name  # its gate is closed in a new model
    )


def test_ranks_alphas_and_rslora():
    model = tiny.model()
    adapted = mllama.adapt(
        model, "attn", rank=4, alpha=8, ranks={"q_proj": 16}, alphas={"v_proj": 3}, rslora=True
    )
    scales = {name.rpartition(".")[2]: layer.scale for name, layer in adapted.layers.items()}
    assert scales == pytest.approx(
        {"q_proj": 8 / math.sqrt(16), "k_proj": 4, "v_proj": 3 / 2, "o_proj": 4}
    )
    assert {name.rpartition(".")[2]: rank for name, rank in adapted.ranks.items()} == {
        "q_proj": 16,
        "k_proj": 4,
        "v_proj": 4,
        "o_proj": 4,
    }
    assert "q_proj (2 layers, rank 16, alpha 32)" in str(adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_in_16_bit_models(dtype):
    model = tiny.model().to(dtype)
    mllama.adapt(model, "all-linear", dora=True)
    assert {parameter.dtype for parameter in mllama.lora_parameters(model)} == {torch.float32}
    assert model(torch.tensor([tiny.tokens(4)])).logits.dtype == dtype


def test_modules_trained_in_full_beside_them(tmp_path):
    model = tiny.model()
    model.resize_token_embeddings(model.config.text_config.vocab_size + 3)
    adapted = mllama.adapt(model, "attn", trained_modules=["projector", "embed_tokens"])
    assert adapted.trained_modules == ("multi_modal_projector", "language_model.embed_tokens")
    others = {name for name in trained(model) if ".lora_" not in name}
    assert {name.split(".")[0] for name in others} == {"multi_modal_projector", "language_model"}
    assert "language_model.embed_tokens.weight" in others
    assert adapted.num_trained > adapted.num_parameters and "in full: multi_modal" in str(adapted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trained_modules": "projektor"}, "projektor"),
        ({"trained_modules": "q_proj"}, "q_proj has adapters"),
        ({"trained_modules": "language_model"}, "language_model has adapters"),
        ({"rank": 0}, "rank"),
        ({"ranks": {"q_proj": 0}}, "rank"),
        ({"alphas": {"q_proj": -1}}, "alpha"),
        ({"alpha": 1e38, "rslora": True}, "alpha must be .* finite in float32, got 4e"),
        ({"alphas": {"fc1": 1}}, "alphas: 'fc1'"),
        ({"dropout": 1}, "dropout"),
        ({"name": "a.b"}, "a.b"),
        ({"name": "train"}, "train"),
    ],
)
def test_errors_change_nothing(options, said):
    model = tiny.model()
    with pytest.raises(ValueError, match=said):
        mllama.adapt(model, **{"targets": "attn"} | options)
    assert mllama.lora_names(model) == [] and all(
        parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": 3}, "targets must be str, got int"),
        ({"targets": {"attn": 4}}, "targets must be str, got dict"),
        ({"dora": "no"}, "dora must be a bool, got str"),
        ({"rslora": 1}, "rslora must be a bool, got int"),
        ({"model": None}, "got NoneType"),
    ],
)
def test_types(options, said):
    with pytest.raises(TypeError, match=said):
        mllama.adapt(**{"model": tiny.model(), "targets": "attn"} | options)


def test_a_tied_head_is_refused_and_never_adapted_by_a_scope():
    model = make("llama, factor 32, tied, older spelling").ours
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        mllama.adapt(model, "lm_head")
    assert "lm_head" not in mllama.adapt(model, "all-linear").names


def test_packed_models_are_adapted_too():
    model = mllama.optimize(tiny.model(), "int8")
    ids = torch.tensor([tiny.tokens(4)])
    with torch.inference_mode():
        before = model(ids).logits
        for name, dora in (("lora", False), ("dora", True)):
            mllama.adapt(model, "all-linear", dora=dora, name=name)
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="embed_tokens has no parameters"):
        mllama.adapt(model, "attn", name="x", trained_modules="embed_tokens")
