"""Meta's tokenizer: files and their faults, ids equal to Meta's class on long and odd texts."""

import base64
import pickle
from pathlib import Path

import pytest
import torch

import mllama

pytest.importorskip("tiktoken", reason="tiktoken is not installed (pip install 'mllama[convert]')")


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    return path


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture
def small(tmp_path):
    return mllama.Tokenizer(
        write_ranks(
            tmp_path / "tokenizer.model", [*BYTES, b"he", b"ll", b"hell", b"hello", b" hello"]
        )
    )


@pytest.fixture(scope="module")
def metas():
    meta = pytest.importorskip(
        "llama_models.llama3.tokenizer",
        reason="llama-models is not installed (--no-deps): no oracle",
    )
    return meta.Tokenizer(Path(meta.__file__).parent / "tokenizer.model")


@pytest.fixture(scope="module")
def ours(metas):
    meta = pytest.importorskip("llama_models.llama3.tokenizer")
    return mllama.Tokenizer(Path(meta.__file__).parent / "tokenizer.model")


def test_encodes_and_decodes(small):
    assert small.encode("hello hello") == [259, 260]
    assert small.encode("hello", bos=True, eos=True) == [small.bos_id, 259, small.eos_id]
    assert small.encode("") == [] and small.encode("", bos=True) == [small.bos_id]
    assert small.decode([small.bos_id, 259, 260]) == "<|begin_of_text|>hello hello"
    assert small.decode(torch.tensor([259, 33])) == "hello!"
    assert small.decode([255]) == "\ufffd"


def test_special_tokens_are_text_unless_allowed(small):
    text = "<|eot_id|>hello<|image|>"
    assert small.decode(small.encode(text)) == text and small.special[
        "<|eot_id|>"
    ] not in small.encode(text)
    assert small.encode(text, allowed_special="all") == [
        small.special["<|eot_id|>"],
        259,
        small.special["<|image|>"],
    ]
    assert small.encode(text, allowed_special={"<|eot_id|>"})[:2] == [
        small.special["<|eot_id|>"],
        259,
    ]
    with pytest.raises(ValueError, match="allowed_special.*<image>"):
        small.encode(text, allowed_special=["<image>"])
    with pytest.raises(TypeError, match="allowed_special.*NoneType"):
        small.encode(text, allowed_special=None)


def test_special_ids_follow_the_file(small):
    assert list(small.special.values()) == list(range(261, 261 + 256)) and small.n_words == 517
    assert (small.bos_id, small.eos_id, small.pad_id) == (261, 262, 265)
    assert small.model.n_vocab == 517


def test_refuses_what_it_cannot_take(small):
    with pytest.raises(TypeError, match="text.*bytes"):
        small.encode(b"hello")
    for ids in (5, ["a"], [1.0], torch.ones(2, 2)):
        with pytest.raises(TypeError, match="ids"):
            small.decode(ids)
    for token in (-1, 517, 2**70):
        with pytest.raises(IndexError, match=f"ids: {token}"):
            small.decode([1, token])


def test_copies_for_worker_processes(small):
    assert pickle.loads(pickle.dumps(small)).encode("hello<") == [259, 60]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "256 of the 256 single bytes are missing"),
        (
            b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02",
            "line 1 is no base64",
        ),  # how Llama 2's SentencePiece file begins
        (b"aGVsbG8= 0 1\n", "line 1 is no base64"),
        (b"aGVsbG8 0\n", "line 1 is no base64"),
        (b"aGVsbG8= many\n", "line 1 is no base64"),
        (b"".join(base64.b64encode(token) + b" 0\n" for token in BYTES), "not the numbers from 0"),
        (
            b"".join(
                base64.b64encode(token) + b" %d\n" % (rank * 2) for rank, token in enumerate(BYTES)
            ),
            "not the numbers from 0",
        ),
        (
            b"".join(
                base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(BYTES[1:])
            ),
            "1 of the 256 single bytes",
        ),
    ],
)
def test_broken_files(tmp_path, content, reason):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=f"is not Meta's tokenizer.model of Llama 3: .*{reason}"):
        mllama.Tokenizer(tmp_path / "tokenizer.model")


def test_missing_file(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="tokenizer"):
            mllama.Tokenizer(path)


TEXTS = {
    "words": "The quick brown fox doesn't jump over 12345 lazy dogs.\r\n\r\n  "
    "Indented\tand\u00a0spaced \n",
    "scripts": "naïve Ångström Ελλάδα Россия 日本語 한국어 العربية हिन्दी ไทย "
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202e \ufeff",
    "code": "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": lambda y: y**2}  # it's\n\n\n",
    "special names": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "lone surrogates": "a\ud800b\udfff \ud83d\ude00",
    "odd spaces": "\x1c\x1d\x85\u2028\u2029\u3000\u200b\x00 \x0b\x0c" * 3,
    "spaces": " " * 60_001,
    "spaces, then a word": " " * 25_000 + "x" + " " * 24_999 + "y" + " " * 25_001 + "z",
    "one letter": "a" * 60_001,
    "newlines": "\n" * 60_001,
    "marks": "!?" * 30_001,
    "more than one part": "word " * 90_001 + "é" * 30_000,
    "a run across parts": "a " * 199_990 + "b" * 60_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_equal_to_metas_class(ours, metas, text):
    assert ours.encode(text) == metas.encode(text, bos=False, eos=False)
    assert ours.encode(text, bos=True, eos=True) == metas.encode(text, bos=True, eos=True)
    assert ours.encode(text, allowed_special="all") == metas.encode(
        text, bos=False, eos=False, allowed_special="all"
    )
    assert ours.decode(ours.encode(text)) == metas.decode(metas.encode(text, bos=False, eos=False))


def test_special_tokens_equal_metas(ours, metas):
    assert ours.special == metas.special_tokens and ours.n_words == metas.n_words == 128_256
    assert ours.special["<|begin_of_text|>"] == 128_000 and ours.special["<|image|>"] == 128_011
