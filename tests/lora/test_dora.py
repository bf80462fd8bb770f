"""DoRA, with PEFT's as the oracle: outputs, gradients, merged weights and files."""

import pytest
import torch
from torch import nn

import mllama
import tiny
from mllama import Linear_LORA
from tiny.pairs import make, pair

peft = pytest.importorskip("peft")
PLACES = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "lora_magnitude_vector"}


def randomize(model: nn.Module) -> None:
    """Adapters that say something; magnitudes near the norms that they start as."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mllama.lora_parameters(model):
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.mul_(0.5 + torch.rand(parameter.shape))


def pairs_of(bias: bool = True):
    """The same layer with DoRA, ours and PEFT's, with their parts side by side."""
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 9, bias=bias)),
        peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5, use_dora=True),
    )
    lora = theirs.base_model.model[0]
    ours = Linear_LORA.around(nn.Linear(12, 9, bias=bias), 3, 5, dora=True)
    ours.linear.load_state_dict(lora.base_layer.state_dict())
    ours.lora_magnitude.weight.data = lora.lora_magnitude_vector["default"].weight.data.clone()
    randomize(ours)
    for mine, other in PLACES.items():
        getattr(lora, other)["default"].weight.data = getattr(ours, mine).weight.data.clone()
    return ours, theirs, lora


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer(bias):
    ours, theirs, lora = pairs_of(bias)
    x, y = (
        torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for _ in range(2)
    )
    torch.testing.assert_close(ours(x), theirs(y))
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for mine, other in PLACES.items():
        torch.testing.assert_close(
            getattr(ours, mine).weight.grad,
            getattr(lora, other)["default"].weight.grad,
            rtol=1e-4,
            atol=1e-4,
        )
    ours.merge()
    lora.merge()
    torch.testing.assert_close(ours.merged_weight, lora.base_layer.weight)


def test_magnitudes_start_as_the_norms_so_that_nothing_changes():
    linear = nn.Linear(12, 9)
    layer, x = Linear_LORA.around(linear, 3, 5, dora=True), torch.randn(4, 12)
    torch.testing.assert_close(layer.lora_magnitude.weight, linear.weight.norm(dim=1))
    torch.testing.assert_close(layer(x), linear(x))


def test_norms_have_no_gradient_and_rows_are_scaled_to_the_magnitudes():
    ours, *_ = pairs_of()
    ours.merge()
    torch.testing.assert_close(ours.merged_weight.norm(dim=1), ours.lora_magnitude.weight.detach())
    ours.unmerge()
    x = torch.randn(2, 12)
    ours(x).sum().backward()
    direction = ours.linear.weight + ours.scale * ours.lora_b.weight @ ours.lora_a.weight
    expected = (x @ direction.T).sum(0) / direction.norm(dim=1)
    torch.testing.assert_close(ours.lora_magnitude.weight.grad, expected.detach())


def test_dropout_is_of_the_update_alone():
    ours, *_ = pairs_of()
    ours.dropout.p = 0.5
    x = torch.randn(3, 12)
    ours.eval()
    plain = ours(x)
    ours.train()
    many = torch.stack([ours(x) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(many, plain, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_within_their_rounding(dtype):
    ours, *_ = pairs_of()
    x = torch.randn(7, 12)
    expected = ours(x)
    ours.linear.to(dtype)
    found = ours(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", ["llama", "llava, clip, -2", "mllama"])
def test_a_model_trains_as_pefts_and_its_files_are_pefts(case, tmp_path):
    both = make(case)
    inputs = pair(case).inputs("one row")
    ours, theirs = both.ours.train(), both.theirs.train()
    mllama.adapt(ours, ["q_proj", "down_proj"], rank=3, dora=True)
    randomize(ours)
    mllama.save_lora(ours, tmp_path, format="peft")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).train()
    if hasattr(ours, "reference"):
        ours.reference = "hf"
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == getattr(ours.config, "image_token_index", -1), -100)
    outputs = [model(**inputs, labels=labels) for model in (ours, adapted)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-3, atol=1e-3)
    for output in outputs:
        output.loss.backward()
    found = {
        name.replace(".default", "").replace("base_model.model.", ""): parameter.grad
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    mine = {}
    for name, layer in ours.named_modules():
        if isinstance(layer, Linear_LORA):
            for part, place in PLACES.items():
                mine[f"{ours.stock_name(name)}.{place}.weight"] = getattr(layer, part).weight.grad
    assert mine.keys() == found.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-3, atol=1e-4, msg=name)

    adapted.save_pretrained(tmp_path / "theirs")
    again = make(case).ours.train()
    mllama.load_lora(again, tmp_path / "theirs")
    if hasattr(again, "reference"):
        again.reference = "hf"
    torch.testing.assert_close(again(**inputs).logits, outputs[0].logits, rtol=0, atol=0)


def test_own_files_round_trip(tmp_path):
    model, ids = tiny.model(), torch.tensor([tiny.tokens(5)])
    mllama.adapt(model, "attn", dora=True)
    randomize(model)
    mllama.save_lora(model, tmp_path / "a.safetensors")
    again = tiny.model()
    mllama.load_lora(again, tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        mllama.merge_lora(again)
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
        mllama.unmerge_lora(again)
        with mllama.lora_disabled(again):
            assert torch.equal(again(ids).logits, tiny.model()(ids).logits)
        merged = mllama.merge_and_unload(again)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain = tiny.model()
    mllama.adapt(plain, "attn")
    with pytest.raises(ValueError, match="lora_magnitude"):
        mllama.load_lora(plain, tmp_path / "a.safetensors")


def test_pefts_format_has_magnitudes_in_all_layers_or_none(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    mllama.adapt(model, "re:0", dora=True)
    mllama.convert_linears_to_lora(model)
    with pytest.raises(ValueError, match="magnitudes"):
        mllama.save_lora(model, tmp_path, format="peft")
    mllama.save_lora(model, tmp_path / "a.safetensors")


def test_a_packed_models_decoder_runs_layer_by_layer():
    """decode_step has no magnitudes: what it would compute must not be taken."""
    model = mllama.optimize(tiny.model(), "f32")
    mllama.adapt(model, "all-linear", dora=True)
    randomize(model)
    dense = tiny.model()
    mllama.adapt(dense, "all-linear", dora=True)
    randomize(dense)
    ids = torch.tensor([tiny.tokens(5)])
    one, other = (
        each.eval().generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for each in (model, dense)
    )
    assert torch.equal(one, other)
