"""LoRA by transformers and PEFT: `model` is a folder, `weights` is "f32", "bf16" or "liger", bf16
with Liger's kernels. A folder with a config.json alone gets random weights.
"""

from argparse import Namespace
from importlib.metadata import version

import torch
import transformers
from lora_steps import RANK, TARGETS, timed_steps
from on_device import has_weights, random_weights, with_memory
from peft import LoraConfig, get_peft_model
from serve import serve


def load(arguments: Namespace) -> tuple[dict, dict]:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    dtype = torch.float32 if arguments.weights == "f32" else torch.bfloat16
    versions = f"{transformers.__version__}, PEFT {version('peft')}"
    if arguments.weights == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        versions += f", Liger {version('liger-kernel')}"
    auto = transformers.AutoModelForCausalLM
    if has_weights(arguments.model):
        model = auto.from_pretrained(arguments.model, dtype=dtype).to(device)
    else:
        config = transformers.AutoConfig.from_pretrained(arguments.model)
        model = random_weights(lambda: auto.from_config(config, dtype=dtype), device, dtype)
    options = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(TARGETS)}
    model = get_peft_model(model, LoraConfig(**options)).train()

    def steps(tokens: int, steps: int) -> dict:
        adapters = (parameter for parameter in model.parameters() if parameter.requires_grad)
        return timed_steps(model, adapters, tokens, steps)

    return {"version": versions}, with_memory({"steps": steps, "nothing": dict}, device)


if __name__ == "__main__":
    serve(load)
