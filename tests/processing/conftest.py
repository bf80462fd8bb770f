import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["How many circles?", "What colour is it?", "two red three blue, describe the picture: hello a b c d"]


@pytest.fixture(scope="session")
def make_tokenizer():
    """make_tokenizer(bos, adds_bos, pad): bytes and a few merges, <eos>; <bos> if asked, which it may put into every text itself; <pad>."""

    def make(bos: bool = True, adds_bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<eos>"] + ["<bos>"] * bos + ["<pad>"] * pad,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(WORDS, trainer)
        if adds_bos:
            tokens = [("<bos>", backend.token_to_id("<bos>"))]
            backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=tokens)
        named = {"eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {}) | ({"pad_token": "<pad>"} if pad else {})
        return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **named)

    return make
