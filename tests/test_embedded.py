"""The model that comes with the package: what it gets right, and that stock transformers reads its
folder.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mllama
from mllama.processing.prompt import CHAT_TEMPLATE
from shapes.evaluation import evaluate, held_out_cases
from shapes.other_renderer import matplotlib_case
from shapes.tokenizer import build_tokenizer

FOLDER = Path(mllama.__file__).parent / "assets" / "embedded"
FLOOR = 0.93  # over color, shape, position and yes/no questions on images of one to three objects
FLOOR_OTHER_RENDERER = 0.93  # the same on images that matplotlib draws
SEED = 9  # neither the evaluation's nor the training's


@pytest.fixture(scope="module")
def embedded():
    return mllama.load(dtype="float32", device="cpu")


def test_accuracy_on_held_out_images(embedded):
    model, processor = embedded
    figures = evaluate(model, processor.tokenizer, held_out_cases(150, seed=SEED))
    assert figures["target"]["questions"] > 250
    assert figures["target"]["share"] >= FLOOR, figures


def test_accuracy_on_images_of_another_library(embedded):
    pytest.importorskip("matplotlib")
    model, processor = embedded
    figures = evaluate(
        model, processor.tokenizer, [matplotlib_case(SEED * 1000 + i) for i in range(60)]
    )
    assert figures["target"]["share"] >= FLOOR_OTHER_RENDERER, figures


def test_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 25 * 2**20


def test_chat_template_is_the_packages(embedded):
    assert (
        (FOLDER / "chat_template.jinja").read_text()
        == CHAT_TEMPLATE
        == build_tokenizer().chat_template
    )
    _, processor = embedded
    turns = [("what is this?", "red"), ("and this?", "a circle")]
    talk = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    talk[0]["content"] = [{"type": "image"}, {"type": "text", "text": talk[0]["content"]}]
    expected = "<image>what is this?\nred<eos>and this?\na circle<eos>"
    for reader in (processor, AutoProcessor.from_pretrained(FOLDER)):
        assert reader.apply_chat_template(talk) == expected
        marked = reader.tokenizer.apply_chat_template(
            talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        answers = [
            token
            for token, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True)
            if mark
        ]
        assert reader.tokenizer.decode(answers) == "red<eos>a circle<eos>"


def test_stock_transformers_gives_equal_ids_and_logits(embedded):
    model, processor = embedded
    case = held_out_cases(1, seed=SEED)[0]
    image = case.image.convert("RGB")
    ours = processor(images=image, text=case.turns[0].question, return_tensors="pt")
    stock_processor = AutoProcessor.from_pretrained(FOLDER)
    talk = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": case.turns[0].question}],
        }
    ]
    prompt = stock_processor.apply_chat_template(talk, add_generation_prompt=True)
    theirs = stock_processor(images=image, text=prompt, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=0)
    stock = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = stock(**theirs).logits
        got = model(**ours).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
