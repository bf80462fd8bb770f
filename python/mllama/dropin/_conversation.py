"""Whose words are whose in a chat of Llama 3's form."""

import torch
from transformers import PreTrainedTokenizerBase

from mllama.processing.tokenizer import Tokenizer

START, END, TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


def assistant_mask(
    input_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase | Tokenizer
) -> torch.Tensor:
    """Where the assistant speaks: from after `<|start_header_id|>assistant<|end_header_id|>` and
    its blank line to `<|eot_id|>`, which is included; without one, to the next header, the padding
    or the end.

    Args:
        input_ids: int [B, T].
        tokenizer: of transformers, or Meta's `Tokenizer`.

    Returns:
        bool [B, T].

    Raises:
        ValueError: the tokenizer lacks one of the three tokens.
    """
    start, end, turn = (_id(tokenizer, token) for token in (START, END, TURN))
    header = [start, *_encode(tokenizer, "assistant"), end]
    blank = _encode(tokenizer, "\n\n")
    pad = tokenizer.pad_id if isinstance(tokenizer, Tokenizer) else tokenizer.pad_token_id
    rows = []
    for row in input_ids.tolist():
        said, place = [False] * len(row), 0
        while place < len(row):
            if row[place : place + len(header)] != header:
                place += 1
                continue
            place += len(header)
            place += len(blank) * (row[place : place + len(blank)] == blank)
            while place < len(row) and row[place] != start and (row[place] != pad or pad == turn):
                said[place] = True
                place += 1
                if row[place - 1] == turn:
                    break
        rows.append(said)
    return torch.tensor(rows, dtype=torch.bool, device=input_ids.device).reshape(input_ids.shape)


def _id(tokenizer: PreTrainedTokenizerBase | Tokenizer, token: str) -> int:
    special = tokenizer.special if isinstance(tokenizer, Tokenizer) else tokenizer.get_vocab()
    found = special.get(token)
    if found is None:
        raise ValueError(f"tokenizer has no {token}, which Llama 3's chats have")
    return found


def _encode(tokenizer: PreTrainedTokenizerBase | Tokenizer, text: str) -> list[int]:
    """The ids of plain text, without any that a tokenizer adds."""
    return list(
        tokenizer.encode(text)
        if isinstance(tokenizer, Tokenizer)
        else tokenizer.encode(text, add_special_tokens=False)
    )
