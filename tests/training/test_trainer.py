"""transformers' Trainer on every family: with the package's LoRA, PEFT's and all parameters;
saving, resuming, evaluating.
"""

import pytest
import torch
from torch.nn.functional import log_softmax

import mllama
import tiny
from families.test_training import examples
from mllama import MllamaForConditionalGeneration
from tiny.pairs import make, pair
from training import two_processes

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from transformers import Trainer, TrainingArguments  # noqa: E402

FAMILIES = ["llama", "gemma", "llava, siglip, several", "paligemma"]


def trainer(model, folder, batches, **options) -> Trainer:
    """A trainer whose every step is one of the batches, in order."""
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
    }
    settings = {
        "save_strategy": "no",
        "learning_rate": 0.01,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "seed": 1,
    }
    other = {
        name: options.pop(name)
        for name in ("compute_metrics", "processing_class")
        if name in options
    }
    arguments = TrainingArguments(str(folder), **quiet | settings | options)
    return Trainer(
        model,
        arguments,
        train_dataset=batches,
        eval_dataset=batches[:1],
        data_collator=lambda rows: dict(rows[0]),
        **other,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def text_batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Of two rows each; every token that follows another is a label."""
    found = [
        tiny.batch(tiny.tokens(7, seed=seed), tiny.tokens(5, seed=100 + seed))
        for seed in range(count)
    ]
    for batch in found:
        follows = torch.nn.functional.pad(batch["attention_mask"], (1, 0))[:, :-1] == 1
        batch["labels"] = batch["input_ids"].where(follows, -100)
    return found


def converted(folder=None, **options) -> MllamaForConditionalGeneration:
    """A tiny model with the package's LoRA; of a folder, which the adapters then name."""
    model = (
        tiny.model() if folder is None else MllamaForConditionalGeneration.from_pretrained(folder)
    )
    model.requires_grad_(False)
    torch.manual_seed(3)
    mllama.convert_linears_to_lora(
        model.language_model,
        **{"rank": 2, "alpha": 4, "target_module_names": ["q_proj", "up_proj"]} | options,
    )
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(folder)
    return folder


def smoothed(logits: torch.Tensor, labels: torch.Tensor, factor: float) -> torch.Tensor:
    """The formula: of the logits at t against the label at t + 1."""
    scores, labels = log_softmax(logits[:, :-1], -1), labels[:, 1:]
    trained = labels != -100
    right = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -((1 - factor) * right + factor * scores.mean(-1))[trained].mean()


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("case", FAMILIES)
def test_label_smoothing_and_predictions(case, wrapped, tmp_path):
    both = make(case)
    batch, seen = examples(both), []
    with torch.no_grad():
        logits = both.ours(
            **{name: value for name, value in batch.items() if name != "labels"}
        ).logits
    expected = smoothed(logits, batch["labels"], 0.1)
    config = peft.LoraConfig(
        target_modules=r".*language_model.*q_proj" if case != "llama" else ["q_proj"], r=2
    )  # changes nothing yet
    model = peft.get_peft_model(both.ours, config) if wrapped else both.ours
    run = trainer(
        model,
        tmp_path,
        [batch],
        max_steps=1,
        label_smoothing_factor=0.1,
        learning_rate=0.0,
        compute_metrics=lambda out: seen.append(out) or {},
    )
    run.train()
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(
        torch.as_tensor(seen[0].predictions), logits[:1], rtol=1e-4, atol=1e-4
    )  # an array, no tuple
    if case in ("llama", "gemma") and not wrapped:
        theirs = trainer(
            both.theirs,
            tmp_path,
            [batch],
            max_steps=1,
            label_smoothing_factor=0.1,
            learning_rate=0.0,
        )
        theirs.train()
        assert losses(theirs)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_llama_32_vision_predicts_logits_alone(tmp_path):
    (model, theirs), seen = make("mllama"), []
    batch = pair("mllama").inputs("one row")
    batch["labels"] = batch["input_ids"].masked_fill(
        batch["input_ids"] == theirs.config.image_token_index, -100
    )
    trainer(
        model, tmp_path, [batch], compute_metrics=lambda out: seen.append(out.predictions) or {}
    ).evaluate()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.as_tensor(seen[0]), model(**batch).logits, rtol=1e-4, atol=1e-4
        )
    model.save_pretrained(tmp_path / "model")
    assert "keys_to_ignore_at_inference" not in (tmp_path / "model" / "config.json").read_text()


def test_subclasses_smooth_rightly_too(tmp_path):
    class Mine(MllamaForConditionalGeneration):
        pass

    model, batch = Mine(make("llama").ours.config), text_batches(1)[0]
    model.load_state_dict(pair("llama").ours.state_dict())
    with torch.no_grad():
        expected = smoothed(
            model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
            0.2,
        )
    run = trainer(model, tmp_path, [batch], max_steps=1, label_smoothing_factor=0.2)
    run.train()
    assert losses(run)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_the_packages_lora_resumes_and_ends_as_a_plain_model(base, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(converted(base), tmp_path / "whole", text_batches(), **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    } <= names
    assert "config.json" not in names

    resumed = trainer(converted(base), tmp_path / "resumed", text_batches(), **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4 and losses(resumed) == pytest.approx(
        losses(whole), rel=1e-5
    )
    for (name, parameter), same in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, same, msg=name)

    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    ids = torch.tensor([tiny.tokens(6)])
    with torch.no_grad():
        expected = whole.model.eval()(ids).logits
        assert torch.equal(again(ids).logits, expected)
        whole.save_model(tmp_path / "end")
        mllama.merge_and_unload(whole.model).save_pretrained(tmp_path / "end")
        plain = MllamaForConditionalGeneration.from_pretrained(tmp_path / "end")
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(layer, mllama.Linear_LORA) for layer in plain.modules())


def test_the_best_adapters_are_loaded_at_the_end(base, tmp_path):
    options = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    options |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 2.0,
        "lr_scheduler_type": "constant",
    }
    run = trainer(converted(base), tmp_path, text_batches(), **options)
    run.train()
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.state.best_model_checkpoint.endswith("checkpoint-1") and run.evaluate()[
        "eval_loss"
    ] == pytest.approx(best)


def test_what_learns_beside_the_adapters_is_saved_and_resumed(base, tmp_path):
    def model():
        made = converted(base)
        made.multi_modal_projector.requires_grad_(True)
        made.language_model.norm.requires_grad_(True)
        return made

    ids = tiny.batch([tiny.IMAGE] * tiny.PATCHES + tiny.tokens(5)) | {
        "pixel_values": tiny.images(1)
    }
    batches = [ids | {"labels": ids["input_ids"]}] * 2
    whole = trainer(model(), tmp_path, batches, max_steps=2, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = trainer(model(), tmp_path / "resumed", batches, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    before = dict(model().named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, msg=name)
        assert torch.equal(again.get_parameter(name), parameter), name
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


@pytest.mark.parametrize("how", ["peft", "full"])
def test_peft_and_all_parameters_resume(how, base, tmp_path):
    def model():
        made = MllamaForConditionalGeneration.from_pretrained(base)
        torch.manual_seed(3)
        return (
            made
            if how == "full"
            else peft.get_peft_model(made, peft.LoraConfig(target_modules=["q_proj"], r=2))
        )

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(model(), tmp_path / "whole", text_batches(), **options)
    whole.train()
    resumed = trainer(model(), tmp_path / "resumed", text_batches(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_labels_that_train_nothing_end_the_run(tmp_path):
    batch = text_batches(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="labels"):
        trainer(converted(), tmp_path, [batch], max_steps=1).train()
    good = text_batches(1)[0]  # beside others of the same step, and in evaluation, they end nothing
    run = trainer(converted(), tmp_path, [batch, good], max_steps=1, gradient_accumulation_steps=2)
    run.train()
    assert losses(run)[0] > 0
    assert run.evaluate([batch])["eval_loss"] != run.evaluate([good])["eval_loss"]


@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_an_accelerate_loop(kind):
    from accelerate import Accelerator

    accelerator, model, batches = (
        Accelerator(cpu=True, gradient_accumulation_steps=2),
        two_processes.learner(kind),
        text_batches(4),
    )
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    learning = [
        parameter for parameter in model.language_model.parameters() if parameter.requires_grad
    ]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(learning, lr=0.05))
    first, steps = [parameter.clone() for parameter in learning], []
    for batch in batches:
        with accelerator.accumulate(model):
            output = model(**batch)
            steps.append((output.loss.item(), int(output.num_trained_tokens)))
            accelerator.backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.gradient_state.plugin_kwargs = {}  # the process's, for other tests
    assert steps[1] == (0.0, 0) and all(
        loss > 0 and tokens > 0 for loss, tokens in (steps[0], *steps[2:])
    )
    assert not any(torch.equal(*both) for both in zip(first, learning, strict=True))
