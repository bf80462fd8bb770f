"""Tiny tokenizers of bytes, with a few merges or with Llama 3's special tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "How many circles?",
    "What colour is it?",
    "two red three blue, describe the picture: hello a b c d",
]
LLAMA3_TOKENS = [
    "begin_of_text",
    "end_of_text",
    "finetune_right_pad_id",
    "start_header_id",
    "end_header_id",
    "eot_id",
    "python_tag",
    "image",
]


def _backend(model) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def make(bos: bool = True, adds_bos: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, <eos>; <bos> if asked, which it may put into every text itself;
    <pad>.
    """
    named = {"eos_token": "<eos>"}
    named |= {"bos_token": "<bos>"} if bos else {}
    named |= {"pad_token": "<pad>"} if pad else {}
    backend = _backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(named.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(WORDS, trainer)
    if adds_bos:
        _add_bos(backend, "<bos>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **named)


def make_llama3(adds_bos: bool = False, without: str = "", **options) -> PreTrainedTokenizerFast:
    """Bytes and Llama 3's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = _backend(
        models.BPE({character: index for index, character in enumerate(alphabet)}, [])
    )
    backend.add_special_tokens([f"<|{name}|>" for name in LLAMA3_TOKENS if name != without])
    if adds_bos:
        _add_bos(backend, "<|begin_of_text|>")
    named = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **options})
