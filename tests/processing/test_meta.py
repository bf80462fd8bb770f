"""Tokenizers and processors of Meta's own folders: Meta's ids and chat format in transformers'
classes.
"""

import base64
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

import mllama
from mllama.hf.processors.tokenizers import fast_tokenizer, load_meta_processor
from mllama.processing.auto import load_preprocessor
from mllama.processing.conversation import encode_messages

TEXTS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs.\r\n\r\n  Indented\tand\u00a0spaced \n",
    "naïve Ελλάδα Россия 日本語 한국어 العربية हिन्दी 👩‍👩‍👧‍👦 e\u0301 \ufeff",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # it's\n\n\n",
    "<|eot_id|>a<|start_header_id|> <|reserved_special_token_0|>b<|end_of_text|>",
    " " * 3000 + "x" * 3000,
]
VISION = {"vision_chunk_size": 28, "vision_max_num_chunks": 4}


@pytest.fixture
def small(tmp_path):
    """small(params) -> a folder with a tokenizer of the single bytes and a few words."""

    def make(params: dict):
        tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello"]
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
        (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
        (tmp_path / "params.json").write_text(json.dumps(params))
        return tmp_path

    return make


def test_text_folder_has_a_tokenizer(small, tmp_path):
    tokenizer = load_meta_processor(small({}))
    assert tokenizer("hello")["input_ids"] == [260, 259]
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [259]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        260,
        261,
        264,
    )
    assert len(tokenizer) == 516 and tokenizer.convert_tokens_to_ids("<|image|>") == 271
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")("hello <|eot_id|>")["input_ids"]
        == tokenizer("hello <|eot_id|>")["input_ids"]
    )


def test_vision_folder_has_a_processor(small, tmp_path):
    processor = load_meta_processor(small({"model": VISION}))
    assert processor.image_token_id == 516  # the first id behind the vocabulary
    assert processor.tokenizer.convert_ids_to_tokens([270, 271, 515]) == [
        "<|python_tag|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_246|>",
    ]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    given = {"images": [[image]], "text": ["<|image|>hello"], "return_tensors": "pt"}
    batch = processor(**given)
    assert batch["input_ids"].tolist() == [[516, 260, 259]]
    assert batch["pixel_values"].shape == (1, 1, 4, 3, 28, 28) and batch[
        "aspect_ratio_ids"
    ].tolist() == [[2]]
    processor.save_pretrained(tmp_path / "saved")
    stock = AutoProcessor.from_pretrained(tmp_path / "saved")(**given)
    assert batch.keys() == stock.keys() and all(
        torch.equal(batch[name], stock[name]) for name in batch
    )


def test_chat_template_is_metas_format(small):
    processor = load_meta_processor(small(VISION))
    messages = [
        {"role": "system", "content": "be brief "},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "tool", "content": "{}"},
    ]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = (
        "<|begin_of_text|>"
        + header.format("system")
        + "be brief <|eot_id|>"
        + header.format("user")
        + "<|image|>what?<|eot_id|>"
    )
    expected += (
        header.format("assistant") + "a cat<|eot_id|>" + header.format("ipython") + "{}<|eot_id|>"
    )
    assert processor.apply_chat_template(messages, tokenize=False) == expected
    ids = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (
        processor.tokenizer.decode(ids) == expected + header.format("assistant")
        and ids.count(260) == 1
    )


@pytest.mark.parametrize("params", [{}, {"model": VISION}])
def test_the_core_gives_the_same(small, params):
    core, stock = load_preprocessor(small(params)), load_meta_processor(small(params))
    tokenizer = getattr(stock, "tokenizer", stock)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    for text in TEXTS:
        content = [{"type": "image", "image": image}] * bool(params) + [
            {"type": "text", "text": text}
        ]
        messages = [{"role": "user", "content": content}]
        ours, theirs = encode_messages(core, messages), encode_messages(stock, messages)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        ids = tokenizer.encode(text)
        own = getattr(core, "tokenizer", core)
        assert own.encode(text) == ids and own.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("content", ["[1]", "{", '"x"', '{"model": 3}', "null"])
def test_broken_params(small, content):
    folder = small({})
    (folder / "params.json").write_text(content)
    with pytest.raises(ValueError, match="params.json"):
        load_meta_processor(folder)


def test_missing_files(small):
    folder = small({})
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        load_meta_processor(folder)
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match="params.json"):
        load_meta_processor(folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"vision_chunk_size": 10**9},
        {"vision_chunk_size": "28"},
        VISION | {"vision_max_num_chunks": 10**9},
    ],
)
def test_sizes_that_cannot_be(small, sizes):
    with pytest.raises(ValueError, match="size|tiles"):
        load_meta_processor(small(VISION | sizes))


def test_ids_equal_metas(tmp_path):
    pytest.importorskip(
        "tiktoken", reason="tiktoken is not installed (pip install 'mllama[convert]')"
    )
    package = pytest.importorskip(
        "llama_models", reason="llama-models is not installed (--no-deps): no tokenizer.model"
    )
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "tokenizer.model").symlink_to(
        Path(package.__file__).parent / "llama3" / "tokenizer.model"
    )
    tokenizer, ours = load_meta_processor(tmp_path), mllama.Tokenizer(tmp_path / "tokenizer.model")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours.encode(text, bos=True, allowed_special="all")
    assert {name: id for name, id in tokenizer.get_added_vocab().items()} == ours.special
    # As Meta's ChatFormat puts a conversation together.
    special, text = ours.special, ours.encode
    expected = [special["<|begin_of_text|>"]]
    for role, content in (("user", "What is 2 + 2?"), ("assistant", "")):
        expected += [
            special["<|start_header_id|>"],
            *text(role),
            special["<|end_header_id|>"],
            *text("\n\n"),
            *text(content),
        ]
        expected += [special["<|eot_id|>"]] if content else []
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
    )


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_of_ours_becomes_transformers(text):
    pytest.importorskip(
        "tiktoken", reason="tiktoken is not installed (pip install 'mllama[convert]')"
    )
    meta = pytest.importorskip(
        "llama_models.llama3.tokenizer",
        reason="llama-models is not installed (--no-deps): no oracle",
    )
    ours, theirs = _both(Path(meta.__file__).parent / "tokenizer.model")
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text, allowed_special="all") and theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
    )
    assert len(theirs) == ours.n_words and theirs.chat_template is None


@functools.cache
def _both(path: Path):
    ours = mllama.Tokenizer(path)
    return ours, fast_tokenizer(ours)
