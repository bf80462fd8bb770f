"""A tokenizer of a few words, built on the spot."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["How many circles?", "What colour is it?", "two red three blue, describe the picture: hello a b c d"]


def small_tokenizer(bos: bool = True, adds_bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, <eos>; with `bos` a <bos>, which with `adds_bos` it puts in front of every text itself; with `pad` a <pad>."""
    special = ["<eos>", *(["<bos>"] if bos else []), *(["<pad>"] if pad else [])]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        pad_token="<pad>" if pad else None,
        padding_side="left",
    )


@pytest.fixture
def make_tokenizer():
    return small_tokenizer
