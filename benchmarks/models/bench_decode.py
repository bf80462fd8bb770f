"""Tokens one by one: a Llama with SmolLM2-135M's sizes, packed in each format, in a session."""

import copy
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case
from mllama import MllamaForConditionalGeneration, optimize
from mllama.quant.packer import RECIPES
from mllama.runtime.session import Session

PEER = "generate of transformers' LlamaForCausalLM, sdpa, in float32"
TOKENS = 32
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def cases() -> Iterator[Case]:
    """32 tokens after a prompt of 64, for one sequence and for 8. GB/s are of the packed weights,
    read once per token.
    """
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    ours = MllamaForConditionalGeneration(LlamaConfig(**CONFIG)).eval()
    ours.load_state_dict(theirs.state_dict())
    for weights in RECIPES:
        model = optimize(copy.deepcopy(ours), weights)
        # The head's buffer is the embedding's: it counts once, as it is read.
        size = sum(
            {b.data_ptr(): b.numel() for b in model.buffers() if b.dtype == torch.uint8}.values()
        )
        for rows in (1, 8):
            ids = torch.randint(0, CONFIG["vocab_size"], (rows, 64))
            yield Case(
                f"{weights}, {rows} x {TOKENS} tokens",
                torch.float32,
                "generate",
                _session(model, ids),
                _generate(theirs, ids),
                bytes=size * TOKENS,
            )


def _session(model: torch.nn.Module, ids: torch.Tensor) -> Callable:
    def run():
        # A new prompt each time: nothing of the last one is in the cache.
        return Session(model).generate({"input_ids": ids}, max_new_tokens=TOKENS)

    return run


def _generate(model: torch.nn.Module, ids: torch.Tensor) -> Callable:
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
    )
