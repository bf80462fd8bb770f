"""Tokenizers of GGUF files and of Meta's own folders as transformers' fast tokenizer."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mllama.hf.processors.chat import with_answers
from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor
from mllama.processing.meta import (
    CHAT_TEMPLATE,
    NAMED,
    byte_pairs,
    meta_backend,
    read_tile_settings,
)
from mllama.processing.text_tokenizer import TextTokenizer
from mllama.processing.tokenizer import Tokenizer


def load_gguf_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file as transformers' fast tokenizer.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a valid GGUF file, or its tokenizer is of another kind.
    """
    from mllama.checkpoints.gguf.tokenizer import read_tokenizer

    tokenizer = TextTokenizer(*read_tokenizer(path))
    ends = tokenizer.encode("")
    return with_answers(
        as_fast(
            tokenizer,
            add_bos_token=tokenizer.bos_token_id in ends,
            add_eos_token=tokenizer.eos_token_id in ends,
            clean_up_tokenization_spaces=False,
        )
    )


def load_meta_processor(folder: str | Path) -> TiledProcessor | PreTrainedTokenizerFast:
    """`mllama.processing.meta.load_meta_preprocessor` as transformers' fast tokenizer, inside a
    processor for a vision model.

    Raises:
        FileNotFoundError: params.json or tokenizer.model is missing.
        ValueError: one of them is broken.
    """
    folder = Path(folder)
    settings = read_tile_settings(folder / "params.json")
    backend = meta_backend(folder / "tokenizer.model", vision=settings is not None)
    tokenizer = as_fast(TextTokenizer(backend, NAMED, CHAT_TEMPLATE))
    if settings is None:
        return with_answers(tokenizer)
    return TiledProcessor(TiledImageProcessor(**settings), tokenizer, chat_template=CHAT_TEMPLATE)


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same vocabulary as transformers' fast tokenizer, with the ids of `tokenizer.encode(text,
    allowed_special="all")`.

    BOS and EOS are named but not added; it pads on the left and has no chat template.
    """
    ranks = {
        token: tokenizer.model.encode_single_token(token)
        for token in tokenizer.model.token_byte_values()
    }
    names = sorted(tokenizer.special, key=tokenizer.special.__getitem__)
    return as_fast(TextTokenizer(byte_pairs(ranks, names), NAMED))


def as_fast(tokenizer: TextTokenizer, **options) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers' class, padding on the left.

    Args:
        options: further arguments of the class.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend,
        chat_template=tokenizer.chat_template,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        **tokenizer.special_tokens_map,
        **options,
    )
