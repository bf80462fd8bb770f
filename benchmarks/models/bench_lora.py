"""A LoRA training step: four layers of Llama-3.2-1B's sizes, its whole vocabulary, rank 16 on all
linear layers, float32 adapters.
"""

from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import mllama
from benchmarks.harness import Case, saved_bytes
from benchmarks.models.bench_llama import CONFIG

PEER = "transformers' LlamaForCausalLM and PEFT's LoRA, sdpa"
RANK, TOKENS = 16, 512
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pair(
    config: dict, rank: int, dtype: torch.dtype
) -> tuple[mllama.MllamaForConditionalGeneration, PeftModel]:
    """Our model and theirs with the same weights and adapters; adapters are float32, as in PEFT."""
    theirs = LlamaForCausalLM(LlamaConfig(**config)).to(dtype)
    ours = mllama.MllamaForConditionalGeneration(LlamaConfig(**config)).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs = get_peft_model(
        theirs,
        LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False
        ),
    )
    mllama.convert_linears_to_lora(
        ours.requires_grad_(False), rank, 2 * rank, target_module_names=TARGETS
    )
    adapters = (parameter for name, parameter in theirs.named_parameters() if "lora_" in name)
    for mine, given in zip(mllama.lora_parameters(ours), adapters, strict=True):
        mine.data = given.detach().clone()
    return ours.train(), theirs.train()


def saved(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes saved for the backward pass of a training step, without parameters."""
    return saved_bytes(
        lambda: model(input_ids=ids, labels=ids, use_cache=False), model.parameters()
    )


def cases() -> Iterator[Case | str]:
    """Memory saved for the backward pass; a step's forward pass, the step with AdamW, and one token
    through unmerged adapters.
    """
    models = pair(CONFIG | {"vocab_size": 128256}, RANK, torch.bfloat16)
    weights = sum(
        parameter.numel() for parameter in models[1].parameters() if not parameter.requires_grad
    )
    for tokens, direction, call, flops in (
        (TOKENS, "forward", _forward, 2),
        (TOKENS, "step", _step, 4),
        (1, "inference", _infer, 0),
    ):
        ids = torch.randint(0, CONFIG["vocab_size"], (1, tokens))
        if direction == "step":
            ours, peer = (saved(model, ids) / 1e6 for model in models)
            yield (
                f"kept for the backward pass of {tokens} tokens: ours {ours:.1f} MB, "
                f"peer {peer:.1f} MB, {ours / peer:.0%}"
            )
        shape, sides = f"{tokens} token{'s' * (tokens > 1)}", (call(model, ids) for model in models)
        yield Case(shape, torch.bfloat16, direction, *sides, flops=flops * weights * tokens)


def _forward(model, ids):
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def _step(model, ids):
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4
    )

    def run():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _infer(model, ids):
    def run():
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    return run
