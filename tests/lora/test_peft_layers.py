"""peft.get_peft_model on our models runs on lora_linear where it can, with PEFT's results."""

import copy

import pytest
import torch

import mllama
import tiny
from tiny.pairs import FAMILIES, make, pair

peft = pytest.importorskip("peft")
from mllama.hf import peft_layers  # noqa: E402
from mllama.hf.peft_layers import OperatorLinear  # noqa: E402

IDS = torch.tensor([tiny.tokens(6)])
TARGETS = ["q_proj", "up_proj", "k_proj"]


@pytest.fixture
def calls(monkeypatch):
    """Counts the operator's calls."""
    made, operator = [], peft_layers.lora_linear

    def counted(*arguments, **options):
        made.append(arguments)
        return operator(*arguments, **options)

    monkeypatch.setattr(peft_layers, "lora_linear", counted)
    return made


def build(model=None, **options):
    torch.manual_seed(0)
    config = {"target_modules": TARGETS, "r": 4, "lora_alpha": 16, "init_lora_weights": False}
    return peft.get_peft_model(model or tiny.model(), peft.LoraConfig(**config | options))


def pefts_own(model):
    """A copy whose layers are PEFT's own."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if type(layer) is OperatorLinear:
            layer.__class__ = OperatorLinear.__base__
    return model


def compare(ours, theirs, inputs, labels, exact=False):
    outputs = [model(**inputs, labels=labels) for model in (ours, theirs)]
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **close)
    for output in outputs:
        output.loss.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, **close, msg=name)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_family(case, calls):
    ours, inputs = build(make(case).ours), pair(case).inputs("one row")
    theirs, ids = pefts_own(ours), inputs["input_ids"]
    labels = ids.masked_fill(ids == getattr(ours.config, "image_token_index", -1), -100)
    compare(ours.train(), theirs.train(), inputs, labels)
    assert len(calls) >= 6


@pytest.mark.parametrize(
    ("options", "on_operator"),
    [
        ({}, True),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
    ],
)
def test_what_the_operator_does_not_have_goes_pefts_way(options, on_operator, calls):
    ours = build(**options)
    compare(ours, pefts_own(ours), {"input_ids": IDS}, IDS, exact=not on_operator)
    assert bool(calls) == on_operator


def test_disabled_merged_several_and_watched_adapters(calls):
    ours = build()
    theirs = pefts_own(ours)
    with torch.no_grad():
        with ours.disable_adapter(), theirs.disable_adapter():
            assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        for model in (ours, theirs):
            model.merge_adapter()
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        for model in (ours, theirs):
            model.unmerge_adapter()
        layer = next(layer for layer in ours.modules() if isinstance(layer, OperatorLinear))
        assert not calls
        ours(IDS)
        before = len(calls)
        seen = []
        hook = layer.base_layer.register_forward_hook(lambda *call: seen.append(call))
        ours(pixel_values=tiny.images(1), input_ids=torch.tensor([[tiny.IMAGE] * tiny.PATCHES]))
        hook.remove()
        assert seen and before
        ours.add_adapter("second", peft.LoraConfig(target_modules=TARGETS, r=2))
        ours.base_model.set_adapter(["default", "second"])
        calls.clear()
        ours(IDS)
        assert not calls
        ours.set_adapter("second")
        ours(IDS)
        assert calls


def test_dropout_and_16_bits(calls):
    ours = build(tiny.model().bfloat16(), lora_dropout=0.5).train()
    torch.manual_seed(0)
    one, other = ours(IDS).logits, ours(IDS).logits
    assert calls and not torch.equal(one, other) and one.dtype == torch.bfloat16
    ours.eval()
    theirs = pefts_own(ours)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0.05, atol=0.05)


def test_removing_them_leaves_a_model_without(tmp_path):
    ours = build()
    with torch.no_grad():
        adapted = ours(IDS).logits
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
        assert not hasattr(merged, "peft_config")
        merged.save_pretrained(tmp_path)
        again = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(again(IDS).logits, adapted, rtol=1e-4, atol=1e-4)


def test_saved_as_pefts_own_and_read_by_both(tmp_path):
    ours = build()
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny.model(), tmp_path)
    assert any(type(layer) is OperatorLinear for layer in again.modules())
    plain = tiny.model()
    mllama.load_lora(plain, tmp_path)
    with torch.no_grad():
        expected = ours(IDS).logits
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_other_models_layers_stay_pefts():
    other = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])
    )
    assert not any(isinstance(layer, OperatorLinear) for layer in other.modules())
