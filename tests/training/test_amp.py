"""Mixed precision: steps of LoRA under autocast against steps in float32, on the CPU or with
--device=cuda on a GPU.
"""

import pytest
import torch

import devices
import mllama
from families.test_training import examples
from mllama.device import choose_dtype
from tiny.pairs import make

FAMILIES = ["llama", "gemma2", "llava, siglip, several", "paligemma", "mllama"]
# Of the norm of a parameter's gradient; rounding to bfloat16 is eight times that to float16.
TOLERANCE = {torch.bfloat16: 0.12, torch.float16: 0.015}


def adapted(case: str):
    """A model with adapters that are not at their start, and a batch with labels."""
    both = make(case)
    model, device = both.ours.requires_grad_(False), devices.tensor_device()
    mllama.convert_linears_to_lora(model.language_model, rank=4, alpha=8)
    torch.manual_seed(1)
    for layer in model.modules():
        if hasattr(layer, "lora_b"):
            torch.nn.init.normal_(layer.lora_b.weight, std=0.05)
    batch = {name: value.to(device) for name, value in examples(both).items()}
    return model.to(device).train(), batch


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: own for name, own in model.named_parameters() if own.requires_grad}


def gradients(model, batch, dtype=None, scaler=None) -> dict[str, torch.Tensor]:
    """Unscaled gradients of one backward pass, under autocast if a dtype is given."""
    model.zero_grad()
    with torch.autocast(devices.tensor_device(), dtype, enabled=dtype is not None):
        loss = model(**batch).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    factor = 1 if scaler is None else scaler.get_scale()
    return {name: own.grad.float() / factor for name, own in trained(model).items()}


def make_scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(devices.tensor_device(), init_scale=scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", FAMILIES)
def test_gradients_are_those_of_float32(case, dtype):
    model, batch = adapted(case)
    expected = gradients(model, batch)
    found = gradients(model, batch, dtype, make_scaler(2.0**10))
    assert found.keys() == expected.keys() and len(found) > 4
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= TOLERANCE[dtype] * wanted.norm(), name


@pytest.mark.parametrize("case", ["llama", "mllama"])
def test_a_scale_brings_out_small_gradients(case):
    """They are below float16's smallest number where they pass its operators."""
    model, batch = adapted(case)
    factor = 2.0**-24
    unscaled = gradients(model, batch, torch.float16, make_scaler(factor))
    scaled = gradients(model, batch, torch.float16, make_scaler(1.0))
    lost = [name for name, x in unscaled.items() if not x.any() and scaled[name].any()]
    assert lost and all(x.isfinite().all() for x in scaled.values())


def test_a_step_with_overflow_is_skipped_and_the_next_ones_learn():
    model, batch = adapted("llama")
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    scaler, steps, losses = make_scaler(2.0**40), [], []
    for _ in range(40):
        before = {name: own.detach().clone() for name, own in trained(model).items()}
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast(devices.tensor_device(), torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(before[name], own) for name, own in trained(model).items())
        assert same == (scaler.get_scale() < scale)
        steps.append(not same)
        losses.append(loss.item())
    assert steps == sorted(steps) and steps[-1] and not steps[0]
    assert losses[-1] < losses[0] and all(own.isfinite().all() for own in trained(model).values())


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_the_dtype_of_a_device(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype(torch.device("cuda:1"), 2**30) == expected
