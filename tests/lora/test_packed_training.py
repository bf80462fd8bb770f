"""Training adapters beside packed weights (QLoRA): as beside the dense weights that these stand
for.
"""

import copy

import pytest
import torch
from torch import nn

import mllama
from helpers import decoded, needs_kernels
from mllama.lora.layer import lora_layers
from mllama.nn.packed import PackedEmbedding, PackedLinear
from mllama.quant.packer import optimize
from tiny import close, pairs

pytestmark = needs_kernels
CASES = [*pairs.ONE_EACH, "mllama"]


def packed(case, weights="int4"):
    return optimize(copy.deepcopy(pairs.pair(case).ours), weights)


def dense(case, packed_model):
    """The same model with the weights that the packed ones stand for."""
    return unpacked(copy.deepcopy(pairs.pair(case).ours).requires_grad_(False), packed_model)


def unpacked(model, packed_model):
    """`model`, given the weights that the packed ones stand for."""
    for name, layer in packed_model.named_modules():
        if isinstance(layer, PackedLinear):
            model.get_submodule(name).weight.data = layer.dense()
        elif isinstance(layer, PackedEmbedding):
            table = layer.format
            model.get_submodule(name).weight.data = mllama.ops.unpack_weight(
                layer.packed, table.rows, table.columns, layer.packing
            )
    return model


def adapted(model, dropout=0.0, names=None):
    """With adapters that are not zero, the same in every model of these shapes."""
    mllama.convert_linears_to_lora(
        model, rank=3, alpha=6, dropout=dropout, target_module_names=names
    )
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for part in layer.adapter():
            part.data = torch.randn(part.shape, generator=generator) / 8
    return model.train()


def examples(case):
    """A batch with labels, for the loss alone."""
    batch = pairs.pair(case).inputs(side="right")
    labels = batch["input_ids"].clone()
    placeholder = getattr(pairs.pair(case).ours.config, "image_token_index", None)
    labels[(batch["attention_mask"] == 0) | (labels == placeholder)] = -100
    labels[labels >= pairs.pair(case).ours.spec.text.vocab_size] = -100
    return batch | {"labels": labels, "logits_to_keep": None}


def trained(model, batch, seed=0):
    """The loss, and the adapters' gradients by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def check_equal(found, expected, tolerance=2e-4):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys() and found[1]
    for name, gradient in found[1].items():
        close(gradient, expected[1][name], tolerance=tolerance, floor=1e-2)


def linears(model):
    """All but the head, whose adapter would need the logits of every position."""
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, PackedLinear)) and name != "lm_head"
    ]


@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_dense_weights(case, weights):
    """Adapters on all linear layers but the head, image towers included."""
    model = packed(case, weights)
    other = adapted(dense(case, model), names=linears(model))
    layers = lora_layers(adapted(model, names=linears(model)))
    assert {type(layer.linear) for layer in layers.values()} == {PackedLinear}
    found = trained(model, examples(case))
    without = set(layers) - {name.rpartition(".lora_")[0] for name in found[1]}
    assert all(name.startswith("vision_tower") for name in without)  # features of an earlier layer
    check_equal(found, trained(other, examples(case)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    """Layers that run without gradients first do not round their inputs either."""
    model = adapted(packed("llama"), dropout=0.3)
    expected = trained(model, examples("llama"))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = trained(model, examples("llama"))
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], msg=name)


def test_a_layer_saves_its_input_and_small_rows():
    layer = mllama.Linear_LORA.around(
        PackedLinear(mllama.ops.pack_weight(torch.randn(96, 64), "int4"), 64, 96, "int4"), 4, 8
    )
    x, saved = torch.randn(10, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda value: value):
        layer(x)
    kept = {layer.linear.packed.data_ptr(), layer.lora_a.weight.data_ptr()}
    kept |= {layer.lora_b.weight.data_ptr()}
    sizes = sorted(value.shape for value in saved if value.data_ptr() not in kept)
    assert sizes == [(10, 4), (10, 64)]


def test_sixteen_bits():
    """Float32 adapters in a bfloat16 model, and under autocast."""
    model = adapted(packed("llama"))
    expected, _ = trained(model, examples("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = trained(model, examples("llama"))
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    rounded = packed("llama").to(torch.bfloat16)
    loss, found = trained(adapted(rounded), examples("llama"))
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@pytest.mark.parametrize("case", ["llava, clip, -2", "mllama", "gemma"])
def test_inputs_get_gradients_without_adapters(case):
    """In training mode and, if they are asked for, in eval mode, where what does not depend on
    these inputs is computed as for inference.
    """
    model = packed(case)
    other, batch = dense(case, model), examples(case)
    if "pixel_values" not in batch:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    name = "pixel_values" if "pixel_values" in batch else "inputs_embeds"
    batch[name].requires_grad_()
    for training, tolerance in ((True, 2e-4), (False, 0.1)):
        found = [
            torch.autograd.grad(one.train(training)(**batch).loss, batch[name])[0]
            for one in (model, other)
        ]
        close(*found, tolerance=tolerance)


def test_training_and_then_decoding():
    """Adapters learn; in eval mode the model decodes by one operator as before, from a cache of
    bytes too, and gives the loss of rounded inputs.
    """
    inputs, batch = pairs.pair("llama").inputs(), examples("llama")
    model = adapted(packed("llama"))
    before = copy.deepcopy(dict(model.named_buffers()))
    optimizer = torch.optim.AdamW(mllama.lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(trained(model, batch)[0])
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    after = dict(model.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    model.eval()
    for cache in (None, "int8"):
        by_step, by_layers = (decoded(model, inputs, fast, cache) for fast in (True, False))
        assert by_step[0] == by_layers[0]
    with torch.no_grad():
        rounded = model(**batch).loss
    assert 0 < (rounded - model(**batch).loss).abs() < 0.1 * rounded


@pytest.mark.parametrize("kind", ["mllama", "peft"])
def test_trained_adapters_round_trip(kind, tmp_path):
    model = adapted(packed("llama"))
    trained(model, examples("llama"))
    torch.optim.SGD(mllama.lora_parameters(model), lr=0.1).step()
    path = tmp_path / ("adapters.safetensors" if kind == "mllama" else "folder")
    mllama.save_lora(model, path, format=kind)
    other = packed("llama")
    mllama.load_lora(other, path)
    expected = trained(model, examples("llama"))
    again = trained(other.train(), examples("llama"))
    torch.testing.assert_close(again[0], expected[0], rtol=0, atol=0)
    # The same file beside the dense weights that the packed ones stand for, and merged into them.
    base = dense("llama", packed("llama"))
    mllama.load_lora(base, path)
    merged = mllama.merge_and_unload(base).eval()
    with torch.no_grad():
        loss = merged(**examples("llama")).loss
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=0)


def test_what_is_refused():
    model = packed("llama")
    with pytest.raises(ValueError, match="packed"):
        model.requires_grad_()
    adapted(model)
    for merge in (mllama.merge_lora, mllama.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge(model)
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
