"""Tiny models of every family on a GPU, against the same on the CPU."""

import copy

import pytest
import torch

import mllama
from tiny import close
from tiny.pairs import MODELS_AND_ROWS, ONE_EACH, pair

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def on_both(model):
    """The model on the CPU and on the GPU."""
    return model, copy.deepcopy(model).to("cuda")


def moved(batch, device):
    return {name: value.to(device) for name, value in batch.items()}


@pytest.mark.parametrize(("case", "rows"), MODELS_AND_ROWS)
def test_logits_and_tokens(case, rows):
    model, there = on_both(pair(case).ours)
    batch = pair(case).inputs(rows)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[seen]
        close(there(**moved(batch, "cuda")).logits.cpu()[seen], expected)
    tokens = there.generate(**moved(batch, "cuda"), **GREEDY)
    assert torch.equal(tokens.cpu(), model.generate(**batch, **GREEDY))


@pytest.mark.parametrize("case", ONE_EACH)
def test_gradients_of_adapters(case):
    model = copy.deepcopy(pair(case).ours).requires_grad_(False)
    mllama.convert_linears_to_lora(model, rank=4)
    for parameter in mllama.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    found = []
    for one in on_both(model):
        device = next(one.parameters()).device
        batch = moved(pair(case).inputs("two images"), device)
        labels = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        one(**batch, labels=labels).loss.backward()
        found.append({n: p.grad.cpu() for n, p in one.named_parameters() if p.grad is not None})
    mine, there = found
    assert mine.keys() == there.keys() and mine
    for name, gradient in mine.items():
        close(there[name], gradient, floor=1e-3)


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_packed_weights(case, weights):
    model, there = on_both(mllama.optimize(copy.deepcopy(pair(case).ours), weights))
    batch = pair(case).inputs("two images")
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[seen]
        close(there(**moved(batch, "cuda")).logits.cpu()[seen], expected, 2e-2)
