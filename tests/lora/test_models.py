"""LoRA in the package's models, with what is done to them: training, checkpointing, autocast,
compiling, generating, folders.
"""

import pytest
import torch
from torch import nn

import mllama
import tiny
from tiny.pairs import ONE_EACH, make, pair

IMAGE = [tiny.IMAGE] * tiny.PATCHES


def adapted(part: str | None = None, sizes: dict | None = None, **options):
    """A tiny model in training mode with adapters that say something, in a part of it or
    everywhere, and nothing else to train.
    """
    model = tiny.model(**sizes or {}).train().requires_grad_(False)
    for layer in mllama.convert_linears_to_lora(
        model if part is None else model.get_submodule(part), **options
    ).values():
        nn.init.normal_(layer.lora_b.weight, std=0.1)
    return model


def batch() -> dict[str, torch.Tensor]:
    found = tiny.batch(IMAGE + tiny.tokens(5), IMAGE + tiny.tokens(3)) | {
        "pixel_values": tiny.images(2)
    }
    return found | {"labels": found["input_ids"]}


def gradients(model, **options) -> dict[str, torch.Tensor | None]:
    """Of every trainable parameter."""
    model.zero_grad()
    model(**batch() | options).loss.backward()
    assert all(
        parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad
    )
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_names_stand_in_the_encoder_too():
    everywhere = mllama.convert_linears_to_lora(tiny.model(), target_module_names=["q_proj"])
    assert {name.split(".")[0] for name in everywhere} == {"vision_tower", "language_model"}
    model = tiny.model()
    made = mllama.convert_linears_to_lora(model.language_model, target_module_names=["q_proj"])
    assert set(made) == {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"}
    assert all(parameter.requires_grad for parameter in model.vision_tower.parameters()), (
        "not touched"
    )


@pytest.mark.parametrize("case", ONE_EACH)
def test_every_family(case, tmp_path):
    model, words = make(case).ours, pair(case).inputs("one row")
    with torch.no_grad():
        before = model(**words).logits
        made = mllama.convert_linears_to_lora(model)
        torch.testing.assert_close(model(**words).logits, before)
        for layer in made.values():
            nn.init.normal_(layer.lora_b.weight, std=0.1)
        expected = model(**words).logits
        mllama.save_lora(model, tmp_path / "adapters.safetensors")
        again = make(case).ours
        mllama.load_lora(again, tmp_path / "adapters.safetensors")
        assert torch.equal(again(**words).logits, expected) and not torch.allclose(
            expected, before, atol=1e-2
        )
        said = model.generate(**words, max_new_tokens=4, do_sample=False, pad_token_id=0)
        mllama.merge_lora(model)
        torch.testing.assert_close(model(**words).logits, expected, rtol=1e-4, atol=5e-4)
        assert torch.equal(
            model.generate(**words, max_new_tokens=4, do_sample=False, pad_token_id=0), said
        )
    mllama.merge_and_unload(model).save_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(
            type(model).from_pretrained(tmp_path / "model")(**words).logits, model(**words).logits
        )


def test_a_tied_head_is_written_as_it_was(tmp_path):
    model = tiny.model(text={"tie_word_embeddings": True})
    made = mllama.convert_linears_to_lora(model)
    assert "lm_head" not in made and model.lm_head.weight is model.get_input_embeddings().weight
    mllama.merge_and_unload(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize(
    "part", [None, "vision_tower", "language_model", "language_model.layers.1.mlp"]
)
def test_checkpointing_activations_changes_no_gradient(part, options):
    model = adapted(part, dropout=0.1)
    torch.manual_seed(1)
    expected = gradients(model)
    model.gradient_checkpointing_enable(options)
    torch.manual_seed(1)
    again = gradients(model)
    assert len(expected) == len(mllama.lora_parameters(model))
    for name, gradient in expected.items():
        assert again[name] is not None and gradient.any(), name
        torch.testing.assert_close(again[name], gradient, msg=name)
    model.gradient_checkpointing_disable()
    assert gradients(model).keys() == expected.keys()


def test_a_frozen_encoder_is_not_gone_back_through(monkeypatch):
    model = adapted("language_model")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    calls = []
    model.vision_tower.encoder.layers[0].self_attn.q_proj.register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    gradients(model)
    assert len(calls) == 1, "computed again by the backward pass"


def test_the_encoder_alone_under_checkpointing():
    encoder = pair("siglip_vision_model").theirs.config
    model = mllama.SiglipModel(encoder).train()
    mllama.convert_linears_to_lora(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(
        torch.randn(2, 3, encoder.image_size, encoder.image_size)
    ).last_hidden_state.square().sum().backward()
    trained = [parameter for parameter in mllama.lora_parameters(model.vision_tower)]
    assert sum(parameter.grad is not None for parameter in trained) == len(trained)


def test_training_under_autocast():
    model = adapted()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32, name
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-4, name
    model.eval()
    mllama.merge_lora(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model(**batch()).logits.dtype == torch.bfloat16


def test_bfloat16_weights_with_float32_adapters_learn():
    model = adapted().bfloat16()
    for parameter in mllama.lora_parameters(model):
        parameter.data = parameter.data.float()
    losses, optimizer = [], torch.optim.AdamW(mllama.lora_parameters(model), lr=1e-2)
    for _ in range(10):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert {parameter.dtype for parameter in mllama.lora_parameters(model)} == {torch.float32}


def test_a_converted_model_compiles_in_one_graph():
    one = {"num_hidden_layers": 1}
    model = adapted("language_model", {"text": one, "vision": one}).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**batch(), use_cache=False).logits, model(**batch(), use_cache=False).logits
        )


def test_weights_are_loaded_into_a_converted_model(tmp_path):
    model, other = adapted(), tiny.model(seed=5)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    report = model.load_state_dict(other.state_dict(), strict=False)
    assert not report.unexpected_keys and all(".lora_" in name for name in report.missing_keys)
    ids = torch.tensor([tiny.tokens(5)])
    with torch.no_grad(), mllama.lora_disabled(model.eval()):
        torch.testing.assert_close(model(ids).logits, other(ids).logits)
    with pytest.raises(RuntimeError, match="Missing key.*lora_a"):
        model.load_state_dict(other.state_dict())
    model.load_state_dict(whole)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def test_transformers_trainer_trains_the_adapters(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = adapted("language_model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    options = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "gradient_checkpointing": True,
    }
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=0.01, save_strategy="no", **options
    )
    trainer = Trainer(model, arguments, train_dataset=[0] * 8, data_collator=lambda _: batch())
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora" not in name), name
    trainer.save_model(tmp_path / "model")
    again = tiny.model()
    mllama.load_lora(again, tmp_path / "model")
    for (name, parameter), same in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same), name


def test_other_formats_refuse_a_converted_model(tmp_path):
    pytest.importorskip("gguf")
    from mllama.hf.gguf import save_gguf

    with pytest.raises(ValueError, match=r"mllama.merge_and_unload\(model\)"):
        save_gguf(adapted("language_model"), mllama.load()[1].tokenizer, tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())
