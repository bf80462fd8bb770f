"""Training of every family: stock transformers' loss and gradients, and what the libraries around
it do with the model.
"""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

import mllama
from tiny import close
from tiny.pairs import LANGUAGE, ONE_EACH, Pair, make, pair, renamed

LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "out", "gate", "up", "down")] + [
    "fc1",
    "fc2",
]


def examples(both: Pair, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch with labels: of PaliGemma the answer's words, as its processor gives them, else every
    word that follows a word.
    """
    batch = both.inputs((["image", 3, 9], ["image", "image", 4], [5, 4]), side, completion=4)
    labels, seen = batch["input_ids"].clone(), batch["attention_mask"].bool()
    labels[~seen | (labels == getattr(both.ours.config, "image_token_index", None))] = -100
    labels[:, 1:][~seen[:, :-1]] = -100
    if "token_type_ids" in batch:
        labels[batch["token_type_ids"] == 0] = -100
    return batch | {"labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def trained(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every parameter's gradient."""
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("case", LANGUAGE)
def test_loss_without_logits(case, frozen):
    """The same loss and gradients as with them, and no logits in the output."""
    model = make(case).ours
    batch = examples(make(case))
    model.lm_head.weight.requires_grad_(not frozen)
    expected, wanted = trained(model, batch)
    loss, found = trained(model, batch | {"logits_to_keep": None})
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys() and (model.lm_head.weight.grad is None) == frozen
    for name, gradient in found.items():
        close(gradient, wanted[name], tolerance=2e-4, floor=1e-2)
    output = model(**batch, logits_to_keep=None)
    assert output.logits is None
    assert output.num_trained_tokens == model(**batch).num_trained_tokens


def test_loss_without_logits_of_a_head_that_is_more_than_its_weight():
    both = make(LANGUAGE[0])
    model, batch = both.ours, examples(both)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(model(**batch, logits_to_keep=None).loss, model(**batch).loss)
    with pytest.raises(ValueError, match="labels must be None: the base model has no head"):
        model.base_model(**batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", LANGUAGE)
def test_loss_and_gradients(case, side):
    both = make(case)
    batch = examples(both, side)
    (loss, mine), (expected, theirs) = (trained(model, batch) for model in both)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    theirs = renamed(theirs)
    assert mine.keys() == theirs.keys() and any(
        name.startswith("language_model.layers") for name in mine
    )
    for name, gradient in mine.items():
        close(
            gradient, theirs[name], tolerance=2e-4, floor=1e-2
        )  # a key's bias has none but rounding


@pytest.mark.parametrize("case", ["siglip_vision_model", "siglip_vision_model, headless"])
def test_gradients_of_the_encoder_alone(case):
    both, found = make(case), []
    for model in (*both, both.ours):
        output = model.train()(both.images(2))
        model.zero_grad()
        (
            output.last_hidden_state if output.pooler_output is None else output.pooler_output
        ).square().sum().backward()
        found.append(gradients(model))
        both.ours.activation_checkpointing_enable({"use_reentrant": False})  # for the third
    mine, theirs, again = found[0], renamed(found[1]), found[2]
    assert mine.keys() == theirs.keys() == again.keys()
    for name, gradient in mine.items():
        close(gradient, theirs[name], floor=1.0)
        torch.testing.assert_close(again[name], gradient)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ONE_EACH)
def test_checkpointing_activations_changes_no_gradient(case, reentrant):
    model = make(case).ours
    batch = examples(pair(case))
    loss, expected = trained(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # this kind needs an input that asks for a gradient
        model.enable_input_require_grads()
        if "pixel_values" in batch:
            batch["pixel_values"].requires_grad_()
    again, gradients = trained(model, batch)
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("case", ONE_EACH)
def test_lora_by_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    batch = examples(pair(case))
    config = peft.LoraConfig(
        target_modules=r".*language_model.*\.(q|v|down)_proj",
        r=2,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(make(case).ours, config)
    _, mine = trained(model, batch)
    assert len(mine) == 3 * 2 * len(model.base_model.model.language_model.layers)
    assert all(gradient.any() for gradient in mine.values())
    model.eval().save_pretrained(tmp_path)
    words = pair(case).inputs("one row")
    answer = model.generate(**words, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        expected = model(**words).logits
        again = peft.PeftModel.from_pretrained(make(case).ours, tmp_path).eval()
        torch.testing.assert_close(again(**words).logits, expected)
        torch.testing.assert_close(
            model.merge_and_unload()(**words).logits, expected, rtol=1e-3, atol=1e-3
        )
        plain = pair(case).ours(**words).logits
    assert answer.shape[1] == words["input_ids"].shape[1] + 3 and not torch.allclose(
        plain, expected, atol=1e-2
    )


@pytest.fixture
def peft():
    """PEFT, where transformers' own `add_adapter` and `load_adapter` take it."""
    found = pytest.importorskip("peft")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"this transformers' add_adapter does not take the installed PEFT: {error}")
    return found


@pytest.mark.parametrize("case", ONE_EACH)
def test_load_adapter_reads_those_of_transformers_class(case, peft, tmp_path):
    both, words = make(case), pair(case).inputs("one row")
    both.theirs.add_adapter(
        peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    )
    both.theirs.save_pretrained(tmp_path)
    both.ours.load_adapter(str(tmp_path))
    with torch.no_grad():
        ours, theirs, plain = (model(**words).logits for model in (*both, pair(case).ours))
    close(ours, theirs)
    assert not torch.allclose(ours, plain, atol=1e-2)
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            f"base_model.model.other.{number}": tensor
            for number, tensor in enumerate(load_file(file).values())
        },
        file,
    )
    with pytest.raises(ValueError, match="not in their file"):
        make(case).ours.load_adapter(str(tmp_path))


def test_of_a_model_with_an_adapter_the_adapter_is_saved(peft, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model, words = make("llama").ours, pair("llama").inputs("one row")
    model.add_adapter(config)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = make("llama").ours
    again.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(again(**words).logits, model(**words).logits)
    inner = peft.get_peft_model(make("llama").ours, config).base_model.model
    with pytest.raises(ValueError, match=r"PeftModel .* merge_and_unload\(\)"):
        inner.save_pretrained(tmp_path / "inner")
    assert not (tmp_path / "inner").exists()


@pytest.mark.parametrize("case", ONE_EACH)
def test_lora_on_embeddings(case):
    """Of tokens and of patches, each as in stock transformers."""
    peft = pytest.importorskip("peft")
    both, words = make(case), pair(case).inputs("one row")
    adapted = []
    for model in both:
        config = peft.LoraConfig(
            target_modules=r".*(embed_tokens|patch_embedding)", r=2, init_lora_weights=False
        )
        adapted.append(peft.get_peft_model(model, config).eval())
    mine, theirs = (
        {
            re.sub(r"(language_|model\.)", "", name): value
            for name, value in model.named_parameters()
            if "lora" in name
        }
        for model in adapted
    )
    assert mine.keys() == theirs.keys() and len(mine) == 2 * (
        1 + (both.ours.spec.encoder is not None)
    )
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(theirs[name])
        ours, stock = (model(**words).logits for model in adapted)
    close(ours, stock)


@pytest.mark.parametrize("case", [*ONE_EACH, "llama, factor 32, tied, older spelling"])
def test_resizing_the_vocabulary(case, tmp_path):
    model, words = make(case).ours, pair(case).inputs("one row")
    with torch.no_grad():
        before = model(**words).logits
        model.resize_token_embeddings(109)
        after = model(**words).logits
    assert after.shape[-1] == model.config.get_text_config().vocab_size == 109
    torch.testing.assert_close(after[..., :99], before)
    tied = model.config.get_text_config().tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(type(model).from_pretrained(tmp_path)(**words).logits, after)


@pytest.mark.parametrize("case", ["llama, odd sizes, biases", "paligemma, odd sizes"])
def test_the_model_compiles_in_one_graph(case):
    model, batch = make(case).ours, examples(pair(case))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, use_cache=False)
        expected = model(**batch, use_cache=False)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("case", ["llama", "llava, siglip, several", "paligemma"])
def test_transformers_trainer_trains_and_resumes(case, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    batch = examples(pair(case))

    def trainer(steps: int) -> Trainer:
        options = {
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, learning_rate=0.01, **options
        )
        return Trainer(
            make(case).ours, arguments, train_dataset=[0] * 8, data_collator=lambda _: batch
        )

    whole = trainer(2)
    whole.train()
    assert whole.state.log_history[-1]["train_loss"] > 0
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    first = pair(case).ours.state_dict()
    for (name, one), two in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, msg=name)
    assert not torch.equal(one, first[name])


def test_every_second_layer_is_checkpointed():
    model = make("llava, siglip, several").ours
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    model.activation_checkpointing_enable(every_n_layers=2)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False] * 3
    model.activation_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("case", [*ONE_EACH, "mllama"])
def test_adapters_beside_peft(case):
    """The same loss and gradients of adapters on every linear layer of decoder and encoder, which
    the layers of one input compute together and with what is computed again.
    """
    peft = pytest.importorskip("peft")
    both = make(case)
    batch = examples(both)
    theirs = peft.get_peft_model(
        both.theirs,
        peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=rf".*({'|'.join(LINEARS)})", init_lora_weights=False
        ),
    )
    model = both.ours.requires_grad_(False)
    found = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    layers = mllama.convert_linears_to_lora(
        model, 3, 5, target_module_names=[name for name in LINEARS if name in found]
    )
    given = renamed(
        {
            name.removeprefix("base_model.model.").replace(".default", ""): value
            for name, value in theirs.named_parameters()
        }
    )
    assert sum("lora_" in name for name in given) == 2 * len(layers)
    for name, layer in layers.items():
        layer.lora_a.weight.data = given[f"{name}.lora_A.weight"].detach().clone()
        layer.lora_b.weight.data = given[f"{name}.lora_B.weight"].detach().clone()
    expected = theirs.train()(**batch).loss
    expected.backward()
    for options in ({}, {"logits_to_keep": None}):
        model.train().zero_grad()
        loss = model(**batch, **options).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        loss.backward()
        for name, layer in layers.items():
            for ours, other in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                gradient = getattr(layer, ours).weight.grad
                wanted = given[f"{name}.{other}.weight"].grad
                if wanted is None:  # past the last encoder layer that is read
                    assert gradient is None
                else:
                    close(gradient, wanted, tolerance=2e-4, floor=1e-2)
