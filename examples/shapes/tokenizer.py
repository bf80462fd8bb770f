"""The embedded model's tokenizer: one token per question word, characters for everything else."""

from __future__ import annotations

from mllama.processing.prompt import CHAT_TEMPLATE  # the layout used in training

from .questions import vocabulary
from .words import CHARACTERS


def build_tokenizer():
    """Build the tokenizer from the question words, without training.

    Lower-case, byte-level pieces. A piece in the vocabulary is one token (`ignore_merges`). Other
    pieces, such as printed words and numbers, are spelled in bytes, because there are no merges.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with <pad>, <eos> and <image>, without <unk> and
        BOS.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<image>"]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in vocabulary():
        pieces += [word, "Ġ" + word]
    pieces += ["Ġ" + character for character in CHARACTERS]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
        additional_special_tokens=["<image>"], padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
