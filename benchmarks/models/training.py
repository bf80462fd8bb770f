"""Models of transformers with PEFT's LoRA, ours with the same weights and adapters, and what of a
training step is compared.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import mllama

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Step = Callable[[], torch.Tensor]


def pair(
    config, make: type[PreTrainedModel], rank: int, dtype: torch.dtype
) -> tuple[mllama.MllamaForConditionalGeneration, PeftModel]:
    """Our model and theirs with the same weights and adapters of the decoder's linear layers;
    adapters are float32, as in PEFT.

    Args:
        config: of both models.
        make: transformers' class.
        rank: of the adapters.
        dtype: of the frozen weights.
    """
    config.dtype = dtype
    with torch.device("cpu"):
        theirs = make(config).to(dtype)
        ours = mllama.MllamaForConditionalGeneration(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    names = "|".join(TARGETS)
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf"(?!.*(vision|projector)).*\.({names})",
        init_lora_weights=False,
    )
    theirs = get_peft_model(theirs, adapters)
    ours.requires_grad_(False)
    layers = mllama.convert_linears_to_lora(
        ours.language_model, rank, 2 * rank, target_module_names=TARGETS
    )
    given = [value for name, value in theirs.named_parameters() if "lora_" in name]
    assert len(given) == 2 * len(layers)
    for mine, value in zip(mllama.lora_parameters(ours), given, strict=True):
        mine.data = value.detach().clone()
    return ours.train(), theirs.train()


def our_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Without logits."""
    return model(**batch, use_cache=False, logits_to_keep=None).loss


def their_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' own."""
    return model(**batch, use_cache=False).loss


def chunked_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over labeled positions, with the logits of some of these at a time, as in Liger's
    fused linear cross entropy and TRL's chunked loss.
    """
    inputs, base = dict(batch), model.get_base_model()
    labels = inputs.pop("labels")[:, 1:].flatten()
    hidden = base.model(**inputs, use_cache=False)[0][:, :-1].flatten(0, 1)
    rows = (labels != -100).nonzero().squeeze(1)
    return _ChunkedLoss.apply(hidden[rows], base.lm_head.weight, labels[rows]) / len(rows)


class _ChunkedLoss(torch.autograd.Function):
    """The sum over rows of a frozen head's cross entropy, with the gradient computed at once."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, rows: int = 128):
        total, gradients = 0.0, []
        for x, targets in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = (x @ weight.T).float()
            total = total + nn.functional.cross_entropy(logits, targets, reduction="sum")
            slopes = logits.softmax(-1)
            slopes[torch.arange(len(x)), targets] -= 1
            gradients.append(slopes.to(x.dtype) @ weight)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None, None


def training_step(
    model: nn.Module,
    loss: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor],
    batch: dict[str, torch.Tensor],
    learning_rate: float = 1e-4,
) -> Step:
    """A call that trains the model's adapters with AdamW once and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)

    def step() -> torch.Tensor:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out at a time during a call, beyond those
    that it had before.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    peak = current = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, current)
    return peak
