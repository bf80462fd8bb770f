"""The assistant's tokens of a conversation, by any chat template, and labels of them."""

import copy
import dataclasses
import pickle

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.processing_llava import LlavaProcessor

import mllama
from mllama import MllamaImageProcessor, chat_labels
from mllama.assets import EMBEDDED
from mllama.hf.processors.chat import with_answers
from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor
from mllama.processing.messages import as_parts
from processing import templates

S = 28
SIZE = {"size": {"height": S, "width": S}}
SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "<|image|>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
SPECIAL += ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
QUESTION, AGAIN = (
    {"role": "user", "content": " two plus two? "},
    {"role": "user", "content": "sure? four"},
)
TALK = [
    QUESTION,
    {"role": "assistant", "content": " four\n"},
    AGAIN,
    {"role": "assistant", "content": "four"},
]


def make(template: str | None = None, adds_bos: bool = False, **options) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE({character: index for index, character in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(SPECIAL)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    named = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template,
    }
    return with_answers(PreTrainedTokenizerFast(tokenizer_object=backend, **named | options))


def said(tokenizer, ids, mask) -> list[str]:
    """The texts of runs of marked tokens."""
    runs, before = [], 0
    for token, marked in zip(
        *(row if isinstance(row, list) else row.tolist() for row in (ids, mask)), strict=True
    ):
        if marked and before:
            runs[-1].append(token)
        elif marked:
            runs.append([token])
        before = marked
    return [tokenizer.decode(run) for run in runs]


def answers(template: str, messages: list[dict], **options) -> list[str]:
    tokenizer = make(template)
    batch = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    return said(tokenizer, batch["input_ids"], batch["assistant_masks"])


CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}],
}
RESULT = {"role": "tool", "content": "4"}
THOUGHT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nfour"}


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("CHATML", TALK, [" four\n<|im_end|>", "four<|im_end|>"]),
        ("LLAMA_VISION", TALK, [" four\n<|eot_id|>", "four<|eot_id|>"]),
        ("LLAMA2", TALK, [" four </s>", " four </s>"]),
        ("LLAVA", TALK, ["  four", " four"]),  # no end token is written
        ("VICUNA", TALK, [" four</s>", " four</s>"]),
        ("GEMMA", TALK, ["four<end_of_turn>", "four<end_of_turn>"]),
        (
            "CHATML",
            [QUESTION, {"role": "assistant", "content": ""}, *TALK[2:]],
            ["<|im_end|>", "four<|im_end|>"],
        ),
        ("MISTRAL", TALK, [" four</s>"] * 2),
        (
            "MISTRAL",
            [{"role": "system", "content": "be brief"}, *TALK, QUESTION],
            [" four</s>"] * 2,
        ),
        ("R1", [QUESTION, THOUGHT, AGAIN, THOUGHT], ["\n\nfour</s>"] * 2),
        ("CHATML", [TALK[1], *TALK], [" four\n<|im_end|>"] * 2 + ["four<|im_end|>"]),
        ("CHATML", [*TALK, QUESTION], [" four\n<|im_end|>", "four<|im_end|>"]),
        (
            "GEMMA",
            TALK[:1] + [{"role": "assistant", "content": [{"type": "text", "text": "four"}]}],
            ["four<end_of_turn>"],
        ),
        (
            "LLAMA_VISION",
            [QUESTION, CALL, RESULT, TALK[3]],
            ['{"name": "add", "parameters": {"x": 2}}<|eot_id|>', "four<|eot_id|>"],
        ),
        (
            "THINKING",
            [QUESTION, THOUGHT, AGAIN, THOUGHT],
            ["four<|im_end|>", "<think>\nwell\n</think>\n\nfour<|im_end|>"],
        ),
        (
            "THINKING",
            [QUESTION, CALL, RESULT, TALK[3]],
            ['\n<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>']
            + ["<think>\n\n</think>\n\nfour<|im_end|>"],
        ),
    ],
)
def test_answers_of_a_template(template, messages, expected):
    before = copy.deepcopy(messages)
    assert answers(getattr(templates, template), messages) == expected and messages == before


def test_answers_that_are_numbers():
    """Such as those of the messages themselves: no other token becomes theirs."""
    for first in range(6):
        said = [str((first + turn) % 6) for turn in range(6)]
        talk = [
            turn for number in said for turn in (AGAIN, {"role": "assistant", "content": number})
        ]
        assert answers(templates.CHATML, talk) == [f"{number}<|im_end|>" for number in said]


def test_a_prompt_that_says_more_than_the_answers_header():
    messages = [
        QUESTION,
        THOUGHT,
        AGAIN,
        {"role": "assistant", "content": "four", "reasoning_content": "well"},
    ]
    found = answers(templates.THINKING, messages, enable_thinking=False)
    assert found == ["four<|im_end|>", "well\n</think>\n\nfour<|im_end|>"]


def test_templates_that_mark_answers_are_taken_at_their_word():
    marked = templates.CHATML.replace(
        "message['content'] +", "'' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{"
    )
    assert "{% generation %}" in marked
    options = {"return_assistant_tokens_mask": True, "return_tensors": "pt", "padding": True}
    ours, stock = make(marked), make(marked)
    del stock.apply_chat_template
    found, wanted = (
        tokenizer.apply_chat_template([TALK, TALK[:2]], **options) for tokenizer in (ours, stock)
    )
    assert wanted["assistant_masks"].any() and all(
        torch.equal(found[name], wanted[name]) for name in wanted
    )


def test_marks_that_the_template_does_not_reach_are_an_error():
    comment = "{# without {% generation %} #}" + templates.CHATML
    assert answers(comment, TALK) == answers(templates.CHATML, TALK)
    marked = templates.CHATML.replace(
        "message['content'] +", "'' }}{% generation %}{{ message['content'] }}{% endgeneration %}{{"
    )
    some = make(
        "{% if messages | length > 2 %}" + marked + "{% else %}" + templates.CHATML + "{% endif %}"
    )
    for tokenizer, talks in ((some, TALK[:2]), (some, [TALK, TALK[:2]])):
        for call in (
            lambda t, x: t.apply_chat_template(x, return_assistant_tokens_mask=True),
            chat_labels,
        ):
            with pytest.raises(ValueError, match="generation"):
                call(tokenizer, talks)
    assert answers(some.chat_template, TALK)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_truncation(side):
    tokenizer = make(templates.CHATML, padding_side=side, truncation_side=side)
    options = {"return_assistant_tokens_mask": True, "return_tensors": "pt", "padding": True}
    batch = tokenizer.apply_chat_template([TALK, TALK[:2]], **options)
    rows = [
        said(tokenizer, ids, mask)
        for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    ]
    assert rows == [[" four\n<|im_end|>", "four<|im_end|>"], [" four\n<|im_end|>"]]
    whole = batch["input_ids"].shape[1]
    cut = tokenizer.apply_chat_template(
        [TALK, TALK[:2]], **options, truncation=True, max_length=whole - 4
    )
    expected = (
        batch["assistant_masks"][0, 4:] if side == "left" else batch["assistant_masks"][0, :-4]
    )
    assert torch.equal(cut["assistant_masks"][0], expected)


def test_forms_of_the_result():
    tokenizer = make(templates.CHATML)
    listed = tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True)
    assert isinstance(listed["assistant_masks"], list) and set(listed) == {
        *tokenizer("a"),
        "assistant_masks",
    }
    array = tokenizer.apply_chat_template(
        TALK, return_assistant_tokens_mask=True, return_tensors="np"
    )["assistant_masks"]
    assert array.tolist() == [listed["assistant_masks"]]
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        other.chat_template = templates.GEMMA
        found = other.apply_chat_template(TALK, return_assistant_tokens_mask=True)
        assert (
            said(other, found["input_ids"], found["assistant_masks"]) == ["four<end_of_turn>"] * 2
        )


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            TALK,
        ),  # no answer is written
        ("{% for m in messages %}{{ m['content'] | length }}{% endfor %}", TALK),
        (templates.CHATML, [QUESTION]),
        (templates.CHATML, [QUESTION, {"role": "gpt", "content": "four"}]),
    ],
)
def test_answers_that_are_not_found_are_an_error(template, messages):
    for call in (
        make(template).apply_chat_template,
        lambda talk, **_: chat_labels(make(template), talk),
    ):
        with pytest.raises(ValueError, match="conversation 0"):
            call(messages, return_assistant_tokens_mask=True)


# ---- processors
# ---------------------------------------------------------------------------------------------


def image(noise, number: int = 0) -> dict:
    return {"type": "image", "image": noise(40, 30, number)}


def seeing(noise, first: int = 1) -> list[dict]:
    """A talk with `first` images in its first turn and one in its second."""
    content = [
        *(image(noise, number) for number in range(first)),
        {"type": "text", "text": "what?"},
    ]
    return [
        {"role": "user", "content": content},
        TALK[3],
        {"role": "user", "content": [image(noise, 5), {"type": "text", "text": "and"}]},
        TALK[3],
    ]


@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_llama_vision(noise, adds_bos, bos):
    template = templates.LLAMA_VISION.replace("{{- bos_token }}", bos)
    processor = TiledProcessor(
        TiledImageProcessor(**SIZE),
        make(adds_bos=adds_bos, padding_side="left"),
        chat_template=template,
    )
    batch = chat_labels(processor, [seeing(noise, 2), TALK[:2]])
    masks = batch["labels"] != -100
    rows = [
        said(processor.tokenizer, ids, mask)
        for ids, mask in zip(batch["input_ids"], masks, strict=True)
    ]
    assert rows == [["four<|eot_id|>", "four<|eot_id|>"], [" four\n<|eot_id|>"]]
    assert torch.equal(batch["labels"][masks], batch["input_ids"][masks]) and batch[
        "pixel_values"
    ].shape[:2] == (2, 3)
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]
    assert set(batch) == {"input_ids", "attention_mask", "cross_attention_mask", "labels"} | {
        "pixel_values",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    }


CHATML_OF_PARTS = templates.CHATML.replace(
    "message['content'] +",
    "'<image>' * (message['content'] | selectattr('type', 'equalto', 'image') | list | length) + "
    "message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join + ",
)


@pytest.mark.parametrize("template", [templates.LLAVA, CHATML_OF_PARTS])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_llava(noise, template, adds_bos):
    processor = MllamaImageProcessor(make(adds_bos=adds_bos), 4, S, chat_template=template)
    batch = chat_labels(processor, [seeing(noise), TALK[:2]])
    end = "" if template is templates.LLAVA else "<|im_end|>"
    start = "" if end else " "
    rows = [
        said(processor.tokenizer, *row)
        for row in zip(batch["input_ids"], batch["labels"] != -100, strict=True)
    ]
    assert rows == [[f"{start}four{end}"] * 2, [f"{start} four" + ("\n" + end if end else "")]]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [8, 0] and len(
        batch["pixel_values"]
    ) == 2
    one = processor.apply_chat_template(
        seeing(noise), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert torch.equal(
        one["assistant_masks"][0].bool(), (batch["labels"][0] != -100)[-one["input_ids"].shape[1] :]
    )


def test_stock_processors_and_tokenizers(noise):
    """Objects of transformers itself: what they mark by `{% generation %}` is what is found without
    it.
    """
    marked = templates.LLAVA.replace(
        "{{ content['text'] + ' ' }}",
        "{% generation %}{{ content['text'] }}{% endgeneration %}{{ ' ' }}",
    )
    tokenizer = make()
    del tokenizer.apply_chat_template
    images = SquareImageProcessor(**SIZE)
    stock = LlavaProcessor(images, tokenizer, 14, "full", chat_template=templates.LLAVA)
    found = chat_labels(stock, [seeing(noise)])
    options = {
        "tokenize": True,
        "return_dict": True,
        "return_assistant_tokens_mask": True,
        "return_tensors": "pt",
    }
    talk = [turn | {"content": as_parts(turn["content"])} for turn in seeing(noise)]
    wanted = LlavaProcessor(
        images, tokenizer, 14, "full", chat_template=marked
    ).apply_chat_template([talk], **options)
    spans = said(tokenizer, found["input_ids"][0], found["labels"][0] != -100)
    assert torch.equal(found["input_ids"], wanted["input_ids"]) and spans == [" four", " four"]
    tokenizer.chat_template = templates.CHATML
    assert (chat_labels(tokenizer, TALK)["labels"] != -100).sum() == len(" four\nfour") + 2


def test_paligemma_takes_prefix_and_suffix(noise, make_tokenizer):
    processor = PaliGemmaProcessor(
        SquareImageProcessor(**SIZE, image_seq_length=4), make_tokenizer()
    )
    talks = [
        seeing(noise)[:2],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "blue, d"}],
    ]
    batch = chat_labels(processor, talks)
    wanted = processor(
        text=["what?", "a"],
        images=[[noise(40, 30)], []],
        suffix=["four", "blue, d"],
        padding=True,
        return_tensors="pt",
    )
    assert set(batch) == set(wanted) and all(
        torch.equal(batch[name], wanted[name]) for name in wanted
    )
    with pytest.raises(ValueError, match="conversation 0"):
        chat_labels(processor, [seeing(noise)])


def test_the_embedded_model():
    processor = mllama.load_processor(EMBEDDED)
    batch = chat_labels(processor, [[QUESTION, {"role": "assistant", "content": "red"}]])
    assert processor.decode(batch["labels"][batch["labels"] != -100]) == "red<eos>"


@pytest.mark.parametrize(
    ("talks", "error"),
    [
        ([], ValueError),
        ([[]], ValueError),
        ("a", TypeError),
        (None, TypeError),
        ([["a"]], TypeError),
        ([[{"role": "assistant", "content": 5}]], TypeError),
        ([[{"role": "user", "content": None}, TALK[3]]], TypeError),
        ([[{"role": None, "content": "a"}]], ValueError),
        ([[{"role": "user", "content": [{"type": "video"}]}]], ValueError),
    ],
)
def test_what_is_no_conversation(talks, error):
    processor = MllamaImageProcessor(make(), 4, S)
    for call in (
        lambda: chat_labels(processor, talks),
        lambda: processor.apply_chat_template(talks),
    ):
        with pytest.raises(error):
            call()
    with pytest.raises(TypeError, match="processor"):
        chat_labels(None, TALK)


def test_messages_may_be_objects():
    message = dataclasses.make_dataclass("Message", ["role", "content", "tool_calls"])
    talk = [message(turn["role"], turn["content"], None) for turn in TALK]
    assert answers(templates.LLAMA_VISION, talk) == answers(templates.LLAMA_VISION, TALK)


def test_a_text_model_takes_no_images():
    with pytest.raises(ValueError, match="image"):
        make(templates.CHATML).apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}]}]
        )


def test_nothing_left_to_train():
    with pytest.raises(ValueError, match="max_length"):
        chat_labels(make(templates.CHATML), TALK, truncation=True, max_length=5)
