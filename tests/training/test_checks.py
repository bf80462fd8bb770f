"""Self-checks: each says yes of a sound run and no of the fault that it is for."""

import json

import pytest
import torch

import mllama
from mllama.cli import main
from mllama.data.collate import Collator
from mllama.data.sources import open_examples
from mllama.plan.run import plan
from mllama.train.checks import run_checks
from tiny import folders
from training.runs import replaced, settings_of, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.write("llava, siglip", tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(folder, tmp_path):
    """(an adapted model, a batch)"""
    model, processor = mllama.load(folder, dtype="float32", device="cpu")
    model.requires_grad_(False)
    mllama.convert_linears_to_lora(model.language_model, rank=4)
    rows = open_examples(write_rows(tmp_path))
    return model, Collator(model, processor)([rows[0], rows[1], rows[2]])


def state(model):
    """Whatever a check must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [module.training for module in model.modules()], torch.get_rng_state()


def same(one, other) -> bool:
    tensors = all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return tensors and one[1] == other[1] and torch.equal(one[2], other[2])


@pytest.mark.parametrize(
    "check",
    [mllama.check_labels, mllama.check_gradients, mllama.check_frozen, mllama.check_overfit],
)
def test_a_sound_run_passes_and_stays_as_it_was(run, check):
    model, batch = run
    options = {"learning_rate": 0.05} if check is mllama.check_overfit else {}
    before = state(model)
    found = check(model, batch, **options)
    assert found.passed, found
    assert str(found).startswith("ok ") and found.name in str(found)
    assert same(before, state(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_model_does_not_compute_needs_no_gradient(run):
    """Trained in full, LLaVA's encoder has parts after the features that are read."""
    model, batch = run
    model.requires_grad_(True)
    found = mllama.check_gradients(model, batch)
    assert found.passed, found
    model(**batch).loss.backward()
    unread = [name for name, one in model.named_parameters() if one.grad is None]
    assert unread == ["vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"]


def test_earlier_gradients_stay(run):
    model, batch = run
    first = next(one for one in model.parameters() if one.requires_grad)
    first.grad = torch.full_like(first, 3.0)
    assert mllama.check_gradients(model, batch).passed
    assert bool((first.grad == 3).all())


def test_a_parameter_without_gradient_is_named(run):
    model, batch = run
    model.multi_modal_projector.requires_grad_(True)
    text = {name: value for name, value in batch.items() if name != "pixel_values"}
    text = {name: value[1:2] for name, value in text.items()}  # the row without an image
    found = mllama.check_gradients(model, text)
    assert not found.passed and "multi_modal_projector" in found.message


def test_a_gradient_that_is_not_finite_is_named(run):
    model, batch = run
    name, first = next((n, one) for n, one in model.named_parameters() if one.requires_grad)
    first.register_hook(lambda grad: grad * float("nan"))
    found = mllama.check_gradients(model, batch)
    assert not found.passed and name in found.message


def test_gradients_that_are_all_zeros_are_a_failure(run):
    model, batch = run
    for one in model.parameters():
        if one.requires_grad:
            one.register_hook(torch.zeros_like)
    found = mllama.check_gradients(model, batch)
    assert not found.passed and "all gradients are zero" in found.message


def test_an_adapter_that_no_step_can_change_is_named(run):
    """Its A is zeros like its B."""
    model, batch = run
    layer = model.language_model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_a.weight.zero_()
    found = mllama.check_gradients(model, batch)
    assert not found.passed and found.message.endswith("in language_model.layers.1.mlp.up_proj")
    with torch.no_grad():
        layer.lora_b.weight[0, 0] = 1.0
    assert mllama.check_gradients(model, batch).passed  # it reaches A


def test_frozen_tensors_that_the_forward_pass_changes_are_named(run):
    model, batch = run
    norm = model.language_model.norm
    norm.register_buffer("calls", torch.zeros(1), persistent=False)

    @norm.register_forward_pre_hook
    def change(module, inputs):
        module.calls.add_(1)
        module.weight.data[0] += 0.5

    found = mllama.check_frozen(model, batch)
    assert not found.passed
    assert found.message.endswith("language_model.norm.calls, language_model.norm.weight")


def test_nothing_trained_is_a_failure(run):
    model, batch = run
    model.requires_grad_(False)
    for check in (mllama.check_gradients, mllama.check_frozen, mllama.check_overfit):
        assert not check(model, batch).passed


def test_a_frozen_tensor_that_shares_memory_with_a_trained_one_is_named(run):
    model, batch = run
    layer = model.language_model.layers[0].self_attn.q_proj
    layer.register_buffer("copy", layer.lora_a.weight.detach())  # the same memory
    found = mllama.check_frozen(model, batch)
    assert not found.passed and "q_proj.copy" in found.message


def test_a_step_that_changes_nothing_is_a_failure(run):
    model, batch = run
    assert not mllama.check_frozen(model, batch, learning_rate=0.0).passed


def test_labels_that_are_wrong_are_named(run):
    model, batch = run
    labels, token = batch["labels"], model.config.image_token_index
    image_row, image_place = (batch["input_ids"] == token).nonzero()[0].tolist()
    trained_row, trained_place = (labels != -100).nonzero()[0].tolist()
    padded_row, padded_place = (batch["attention_mask"] == 0).nonzero()[0].tolist()

    def changed(row: int, place: int, value: int) -> dict:
        other = labels.clone()
        other[row, place] = value
        return batch | {"labels": other}

    wrong = {
        "placeholders": changed(image_row, image_place, token),
        "padding": changed(
            padded_row, padded_place, int(batch["input_ids"][padded_row, padded_place])
        ),
        "vocabulary": changed(trained_row, trained_place, model.spec.text.vocab_size),
        "not the ids": changed(
            trained_row, trained_place, int(labels[trained_row, trained_place]) - 1
        ),
        "nothing to train on": batch | {"labels": labels.index_fill(0, torch.tensor([1]), -100)},
        "prompts too": {
            name: value[1:2] if value.shape[0] == 3 else value
            for name, value in batch.items()
            if name != "pixel_values"
        },
    }
    text = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    text[text == token] = -100
    one = labels.clone()
    one[image_row] = text[image_row]  # the only row of three, and it has an image
    wrong[f"every token of row {image_row} is trained"] = batch | {"labels": one}
    ids = wrong["prompts too"]["input_ids"]
    mask = wrong["prompts too"]["attention_mask"]
    wrong["prompts too"]["labels"] = ids.masked_fill(mask == 0, -100)
    for text, given in wrong.items():
        found = mllama.check_labels(model, given)
        assert not found.passed and text in found.message, (text, found)


def test_a_label_between_packed_examples_is_named(run, folder, tmp_path):
    """It would be predicted from another example."""
    model, _ = run
    processor = mllama.load(folder, device="cpu")[1]
    rows = open_examples(write_rows(tmp_path))
    batch = Collator(model, processor, max_length=64, pack=True)([rows[1], rows[3]])
    assert mllama.check_labels(model, batch).passed
    start = batch["position_ids"][0].tolist().index(0, 1)
    batch["labels"][0, start] = batch["input_ids"][0, start]
    found = mllama.check_labels(model, batch)
    assert not found.passed
    assert found.message == (
        f"1 labels on first tokens of packed examples, the first in row 0, token {start}"
    )


def test_a_loss_that_does_not_fall_is_a_failure(run):
    model, batch = run
    assert not mllama.check_overfit(model, batch, learning_rate=0.0).passed
    hooks = [one.register_hook(torch.neg) for one in model.parameters() if one.requires_grad]
    assert not mllama.check_overfit(model, batch, learning_rate=0.05).passed  # it rises
    for hook in hooks:
        hook.remove()
    assert mllama.check_overfit(model, batch, learning_rate=0.05).passed
    model.lm_head.weight.data[0, 0] = float("nan")
    found = mllama.check_overfit(model, batch)
    assert not found.passed and "nan" in found.message


@pytest.mark.parametrize("family", ["llama", "paligemma", "mllama"])
def test_all_checks_of_a_run(family, tmp_path):
    model = folders.write(family, tmp_path / "model")
    rows = write_rows(tmp_path)
    if family != "mllama":  # text alone, or an image in every row
        lines = rows.read_text().splitlines()
        rows.write_text("\n".join(lines[1::2] if family == "llama" else lines[::2]))
    settings = settings_of(model, rows, tmp_path / "run", eval_fraction=0.0, eval_every=None)
    found = run_checks(settings)
    named = {check.name: check for check in found}
    assert [check.passed for check in found[:3]] == [True] * 3, found
    assert set(named) == {"check_labels", "check_gradients", "check_frozen", "check_overfit"}


def test_bad_rows_are_skipped_by_checks_and_plans_too(tmp_path):
    model = folders.write("llama", tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    bad, good = {"question": "What?", "answer": ""}, {"question": "What?", "answer": "this"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in (bad, good, bad, good)))
    settings = settings_of(model, rows, tmp_path / "run", eval_fraction=0.0, eval_every=None)
    for check in (run_checks, plan):
        with pytest.raises(ValueError, match="row 1"):
            check(settings)
    settings = replaced(settings, skip_bad_rows=True)
    assert run_checks(settings)[0].passed
    assert plan(settings).work["looked at"] == 2


def test_the_command(tmp_path, capsys):
    model = folders.write("llava, siglip", tmp_path / "model")
    words = ["train", "--data", str(write_rows(tmp_path)), "--model", str(model), "--check"]
    words += ["--device", "cpu", "--batch-size", "2", "--output", str(tmp_path / "run")]
    code = main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "check_labels:",
        "check_gradients:",
        "check_frozen:",
        "check_overfit:",
    ]
    assert code == int(any(line.startswith("FAIL") for line in lines))
    assert not (tmp_path / "run").exists()
    main([*words, "--json"])
    assert [check["name"] for check in json.loads(capsys.readouterr().out)][0] == "check_labels"
    assert main([*words, "--resume"]) == 2
