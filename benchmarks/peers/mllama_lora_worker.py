"""LoRA in mllama: `model` is a folder, `weights` is "f32" or "bf16", of what is not packed in it. A
folder with a config.json alone gets random weights.
"""

from argparse import Namespace
from importlib.metadata import version

import torch
from lora_steps import RANK, TARGETS, timed_steps
from on_device import has_weights, random_weights, with_memory
from serve import serve
from transformers import AutoConfig

import mllama


def load(arguments: Namespace) -> tuple[dict, dict]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.weights]
    kind = mllama.MllamaForConditionalGeneration
    if has_weights(arguments.model):
        model = kind.from_pretrained(arguments.model, dtype=dtype).to(device)
    else:
        config = AutoConfig.from_pretrained(arguments.model)
        model = random_weights(lambda: kind(config), device, dtype)
    mllama.convert_linears_to_lora(
        model.requires_grad_(False), RANK, 2 * RANK, target_module_names=TARGETS
    )
    model.train()

    def steps(tokens: int, steps: int) -> dict:
        adapters = mllama.lora_parameters(model)
        return timed_steps(model, adapters, tokens, steps, logits_to_keep=None)

    return {"version": version("mllama")}, with_memory({"steps": steps, "nothing": dict}, device)


if __name__ == "__main__":
    serve(load)
