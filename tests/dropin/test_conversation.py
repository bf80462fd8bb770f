"""`_create_conversation_mask`: which words are the assistant's, by tokenizers of either kind."""

import base64

import pytest
import torch

import mllama
from dropin import older

CHAT = (
    "<|begin_of_text|>",
    *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "hello", "<|eot_id|>"),
    *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n", "a b", "<|eot_id|>"),
    *("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", "assistant?", "<|eot_id|>"),
    *("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n", "c d"),
)
SAID = (11, 12, 23)  # the parts that the assistant says


@pytest.fixture(params=["transformers", "tiktoken"])
def tokenizer(request, make_tokenizer, tmp_path):
    if request.param == "transformers":
        made = make_tokenizer(adds_bos=True)
        made.add_tokens(
            ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"],
            special_tokens=True,
        )
        return made
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    ranks = [bytes([byte]) for byte in range(256)] + [b"as", b"ass", b"\n\n"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    return mllama.Tokenizer(path)


def encode(tokenizer, part: str) -> list[int]:
    if isinstance(tokenizer, mllama.Tokenizer):
        return tokenizer.encode(part, allowed_special="all")
    return tokenizer.encode(part, add_special_tokens=False)


def row(tokenizer, parts, said) -> tuple[list[int], list[bool]]:
    ids, mask = [], []
    for place, part in enumerate(parts):
        found = encode(tokenizer, part)
        ids += found
        mask += [place in said] * len(found)
    return ids, mask


def test_what_the_assistant_says(tokenizer):
    ids, expected = row(tokenizer, CHAT, SAID)
    mask = older.model()._create_conversation_mask(torch.tensor([ids]), tokenizer)
    assert mask.dtype == torch.bool and mask.tolist() == [expected]


def test_rows_padding_and_talk_without_an_assistant(tokenizer):
    pad = tokenizer.pad_id if isinstance(tokenizer, mllama.Tokenizer) else tokenizer.pad_token_id
    rows = [
        row(tokenizer, CHAT[:13], SAID),
        row(tokenizer, CHAT, SAID),
        row(tokenizer, CHAT[:7], ()),
    ]
    longest = max(len(ids) for ids, _ in rows) + 3
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    expected = [mask + [False] * (longest - len(mask)) for _, mask in rows]
    assert older.model()._create_conversation_mask(ids, tokenizer).tolist() == expected


def test_a_header_at_the_very_end(tokenizer):
    ids, _ = row(tokenizer, CHAT[:10], ())
    assert not older.model()._create_conversation_mask(torch.tensor([ids]), tokenizer).any()


def test_a_tokenizer_without_such_chats_is_refused(make_tokenizer):
    with pytest.raises(
        ValueError, match="tokenizer has no <.start_header_id.>, which Llama 3's chats have"
    ):
        older.model()._create_conversation_mask(torch.tensor([[1, 2]]), make_tokenizer())
