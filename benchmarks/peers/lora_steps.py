"""A LoRA training step, timed alike for every engine on torch."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from on_device import wait_for
from torch import nn

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def timed_steps(
    model: nn.Module, adapters: Iterable[nn.Parameter], tokens: int, steps: int, **options: Any
) -> dict:
    """Seconds of some steps with AdamW on one sequence, after one to warm up.

    Args:
        model: whose other weights are frozen.
        adapters: its parameters that are trained.
        tokens: of the sequence.
        steps: that are timed.
        options: of the model's forward.

    Returns:
        `seconds`, `tokens`, and `more`: seconds of a step, and on a GPU the most memory above the
        frozen weights, in GB.
    """
    adapters, device = list(adapters), next(model.parameters()).device
    ids = torch.randint(model.config.vocab_size // 2, (1, tokens), device=device)
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)
    for step in range(steps + 1):
        if step == 1:
            wait_for(device)
            start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wait_for(device)
    seconds = time.perf_counter() - start
    more = {"step_seconds": seconds / steps}
    if device.type == "cuda":
        frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        more["above_weights_gb"] = (torch.cuda.max_memory_allocated() - frozen) / 1e9
    return {"seconds": seconds, "tokens": tokens * steps, "more": more}
