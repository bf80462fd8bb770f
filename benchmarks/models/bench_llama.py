"""Prefill and decoding of a Llama with Llama-3.2-1B's sizes, four of its sixteen layers and a small
vocabulary.
"""

from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import DTYPES, Case
from mllama import MllamaForConditionalGeneration

PEER = "transformers' LlamaForCausalLM, sdpa"
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def cases() -> Iterator[Case]:
    """Prefill of 256 and 1024 tokens; 16 tokens of greedy `generate` after a prompt of 256."""
    for dtype in DTYPES:
        theirs = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(dtype).eval()
        ours = MllamaForConditionalGeneration(LlamaConfig(**CONFIG)).to(dtype).eval()
        ours.load_state_dict(theirs.state_dict())
        for length in (256, 1024):
            ids = torch.randint(0, CONFIG["vocab_size"], (1, length))
            yield Case(
                f"prompt of {length}", dtype, "forward", _prefill(ours, ids), _prefill(theirs, ids)
            )
        ids = torch.randint(0, CONFIG["vocab_size"], (1, 256))
        yield Case(
            "256, then 16 tokens", dtype, "generate", _generate(ours, ids), _generate(theirs, ids)
        )


def _prefill(model, ids):
    def run():
        with torch.inference_mode():
            return model(input_ids=ids, logits_to_keep=1).logits

    return run


def _generate(model, ids):
    return lambda: model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        min_new_tokens=16,
        do_sample=False,
    )
