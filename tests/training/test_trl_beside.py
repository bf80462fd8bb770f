"""`mllama train` beside TRL's SFTTrainer: losses step by step, and which tokens have labels."""

import re
import shutil
from itertools import groupby

import pytest
from transformers import AutoTokenizer

import mllama
from mllama.data.collate import Collator
from mllama.data.rows import Example

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from benchmarks.models.train_smollm2 import OURS, difference, loss_curves  # noqa: E402
from mllama.train.settings import TrainSettings  # noqa: E402
from tiny import tokenizers  # noqa: E402
from training.test_sft import TALKS, TEMPLATE  # noqa: E402

UNMARKED = re.sub(r"\{% (end)?generation %\}", "", TEMPLATE)
ROWS = [{"question": question, "answer": answer} for question, answer in TALKS]


@pytest.fixture
def folder(family_folder, tmp_path):
    """A text model whose chat template ends answers, and does not mark them."""
    path = shutil.copytree(family_folder("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = UNMARKED
    tokenizer.save_pretrained(path)
    return path


def test_losses_of_adapters_are_trls(folder, tmp_path):
    """On transformers' model with PEFT, and on ours: rows of unequal length, in an order of their
    own, two passes a step, warm-up, clipping.
    """
    settings = TrainSettings(
        model=str(folder),
        data=str(tmp_path / "work/rows.jsonl"),
        output=str(tmp_path / "work/run"),
        max_steps=6,
        batch_size=2,
        accumulation=2,
        learning_rate=1e-2,
        warmup=2,
        max_grad_norm=0.5,
        rank=4,
        seed=1,
        dtype="float32",
        device="cpu",
    )
    curves = loss_curves(settings, ROWS * 2, TEMPLATE, tmp_path / "work")
    own = curves.pop(OURS)
    assert len(own) == 6 and own[-1] < own[0] - 0.5 and len(curves) == 2
    for found in curves.values():
        assert difference(found, own) < 1e-3


CONVERSATIONS = [
    [("user", "How many circles?"), ("assistant", "two"), ("user", "And?"), ("assistant", "red")],
    [("system", "Be brief."), ("user", "hello"), ("assistant", "a b c d")],
]
# By the name of TRL's template: special tokens, the one that ends an answer first.
ENDS = {
    "llama3": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "qwen2_5": ("<|im_end|>", "<|im_start|>"),
    "gemma3": ("<end_of_turn>", "<start_of_turn>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_labels_are_those_of_assistant_only_loss(name, family_folder, tmp_path):
    """TRL has templates with marks for some of the known ones; here answers are found without. For
    two of them TRL also trains line ends that are the template's.
    """
    model, _ = mllama.load(family_folder("llama"), "float32", "cpu")
    tokenizer = tokenizers.make()
    end, *others = ENDS[name]
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": others})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = getattr(trl.chat_template_utils, f"{name}_chat_template")
    collator = Collator(model, tokenizer)
    ours = [
        collator.encode(
            Example(
                [
                    {"role": role, "content": [{"type": "text", "text": text}]}
                    for role, text in talk
                ],
                name,
            )
        )
        for talk in CONVERSATIONS
    ]
    rows = [[{"role": role, "content": text} for role, text in talk] for talk in CONVERSATIONS]
    arguments = trl.SFTConfig(
        str(tmp_path), assistant_only_loss=True, max_length=None, use_cpu=True, bf16=False
    )
    theirs = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"messages": row} for row in rows]),
        processing_class=tokenizer,
    ).train_dataset
    for own, other, talk in zip(ours, theirs, CONVERSATIONS, strict=True):
        ids, labels = own.input_ids.tolist(), own.labels.tolist()
        assert ids == other["input_ids"]
        found = runs(tokenizer, labels)
        assert found == [text + end for role, text in talk if role == "assistant"]
        assert found == [text.strip() for text in runs(tokenizer, other["labels"])]
        assert name != "llama3" or labels == other["labels"]


def runs(tokenizer, labels: list[int]) -> list[str]:
    """Texts of labels that stand side by side."""
    found = [list(run) for labeled, run in groupby(labels, lambda label: label != -100) if labeled]
    return [tokenizer.decode(run) for run in found]
