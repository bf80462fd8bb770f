"""`decode_step` with several new positions per row: each has the bits that it has alone."""

import copy

import pytest
import torch
from transformers import DynamicCache

import mllama
import tiny
from helpers import counted_steps, instruction_set, instruction_sets, layer_by_layer, needs_kernels
from mllama.lora.layer import lora_layers
from mllama.model.fast_decoder import MAX_ROWS
from mllama.quant.packer import RECIPES, optimize
from mllama.runtime.progress import Stages
from mllama.runtime.session import Session
from tiny import pairs

pytestmark = needs_kernels


def packed(case, weights="f32", **options):
    """A packed model whose gates are open, if it has any."""
    model = copy.deepcopy(pairs.make(case, **options).ours)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return optimize(model, weights)


@torch.inference_mode()
def passes(model, inputs, sizes, kv_cache=None):
    """Logits [B, sum of sizes, V] of new positions behind a prompt, in passes of these sizes, and
    how many of these ran by `decode_step`.
    """
    prompt = (session := Session(model, kv_cache=kv_cache))._prompt
    prompt.prefill(session._take_inputs(inputs), Stages())
    vocabulary = model.spec.text.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = len(inputs["input_ids"]), sum(sizes)
    ids = torch.randint(1, vocabulary, shape, generator=generator)
    with counted_steps() as calls:
        logits = torch.cat([prompt.append(part) for part in ids.split(sizes, 1)], 1)
    return logits, calls.call_count


def check(model, inputs, sizes=(), kv_cache=None):
    """Every size of a pass against single positions, to the bit, and the layers within rounding."""
    most = MAX_ROWS // len(inputs["input_ids"])
    expected, _ = passes(model, inputs, [1] * most, kv_cache)
    for size in sizes or range(2, most + 1):
        rest = most % size
        parts = [size] * (most // size) + [rest] * (rest > 0)
        logits, calls = passes(model, inputs, parts, kv_cache)
        assert calls == len(parts)
        assert torch.equal(logits, expected), f"{size} positions"
    return expected


@pytest.mark.parametrize(("case", "rows"), pairs.SESSIONS)
def test_every_family(case, rows):
    model, inputs = packed(case), pairs.pair(case).inputs(rows)
    given = check(model, inputs)
    with layer_by_layer(model):
        by_layers, calls = passes(model, inputs, [given.shape[1]])
    assert calls == 0
    assert (given - by_layers).abs().max() <= 1e-5 * by_layers.abs().max()


@pytest.mark.parametrize("reference", ["meta", "hf"])
@pytest.mark.parametrize("rows", pairs.TILED_ROWS)
def test_layers_that_attend_to_images(rows, reference):
    model = packed("mllama")
    model.reference = reference
    given = check(model, inputs := pairs.pair("mllama").inputs(rows))
    with layer_by_layer(model):
        by_layers, _ = passes(model, inputs, [given.shape[1]])
    assert (given - by_layers).abs().max() <= 1e-5 * by_layers.abs().max()


@pytest.mark.parametrize("weights", RECIPES)
def test_every_format_and_instruction_set(weights):
    model, inputs = packed("gemma2", weights), pairs.pair("gemma2").inputs("one row")
    for isa in instruction_sets():
        with instruction_set(isa):
            check(model, inputs, (2, 3, 4, 7, 8, 16))


@pytest.mark.parametrize("kv_cache", ["int8", "bf16", "f16"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3_text", "mllama"])
def test_a_cache_in_a_dtype_of_its_own(case, kv_cache):
    check(packed(case), pairs.pair(case).inputs(), kv_cache=kv_cache)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text"])
def test_windows_shorter_than_the_prompt(case):
    """And a prompt of several chunks of the attention kernel."""
    model = packed(case)
    windows = [layer.window for layer in model.spec.text.layers if layer.window]
    context = model.spec.text.max_position_embeddings
    assert windows and max(windows) < context - MAX_ROWS
    inputs = {"input_ids": torch.tensor([tiny.tokens(context - MAX_ROWS)])}
    check(model, inputs, (2, 5, 16))
    check(model, inputs, (4,), kv_cache="int8")


def test_a_long_cache():
    """Several chunks of keys, which end within a pass."""
    model = packed("llama")
    inputs = {"input_ids": torch.randint(1, 90, (2, 253), generator=torch.manual_seed(0))}
    check(model, inputs)
    inputs = {"input_ids": torch.randint(1, 90, (1, 1277), generator=torch.manual_seed(0))}
    check(model, inputs, (3, 16))


def test_adapters_beside_packed_weights():
    model = packed("llama", "int4")
    names = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]  # torch multiplies with a head's
    mllama.convert_linears_to_lora(model, rank=3, alpha=6, target_module_names=names)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        for part in layer.adapter():
            part.data = torch.randn(part.shape, generator=generator) / 8
    check(model.eval(), pairs.pair("llama").inputs())


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads):
    model, inputs = packed("llama", "int4"), pairs.pair("llama").inputs("one row")
    expected, before = passes(model, inputs, [1] * 8)[0], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = passes(model, inputs, [5, 3])[0]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(given, expected)


@torch.no_grad()
@pytest.mark.parametrize("reference", ["meta", "hf"])
def test_positions_that_see_different_images(reference, caplog):
    """Run by the layers; with "hf" a position that sees none attends as if it saw all of them."""
    model = packed("mllama")
    model.reference = reference
    inputs = pairs.pair("mllama").inputs("one row")
    cache, new = DynamicCache(config=model.config), torch.tensor([[5, 6, 7]])
    model(**inputs, past_key_values=cache)
    mask = inputs["cross_attention_mask"]
    other = mask[:, -1:].expand(-1, 3, -1, -1).clone()
    other[:, 1:] = 0
    full = torch.cat([mask, other], 1)
    with caplog.at_level("DEBUG", logger="mllama"), counted_steps() as calls:
        given = model(new, past_key_values=cache, cross_attention_mask=full).logits
    by_layers = reference == "meta"
    assert calls.call_count == (not by_layers) and ("different images" in caplog.text) == by_layers
    cache.crop(-3)
    with counted_steps() as calls:
        single = [
            model(
                new[:, i : i + 1], past_key_values=cache, cross_attention_mask=other[:, i : i + 1]
            )
            for i in range(3)
        ]
    assert calls.call_count == 3
    expected = torch.cat([one.logits for one in single], 1)
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("B", "T", "steps"), [(1, 16, 1), (1, 17, 0), (4, 4, 1), (4, 5, 0)])
def test_sixteen_rows_of_products(B, T, steps):
    model, cache = packed("llama"), DynamicCache()
    ids = torch.randint(1, 90, (B, 6 + T), generator=torch.manual_seed(0))
    model(ids[:, :6], past_key_values=cache)
    with counted_steps() as calls:
        given = model(ids[:, 6:], past_key_values=cache).logits
    assert calls.call_count == steps
    expected = model(ids).logits[:, 6:]
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_positions_and_padding_of_transformers():
    """Rows of their own positions, and new positions that are padding."""
    model, ids = packed("gemma2"), torch.randint(1, 90, (2, 9), generator=torch.manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    places = torch.tensor([[*range(9)], [*([0] * 4), *range(3, 8)]])

    def run(way):
        cache = DynamicCache(config=model.config)
        outputs = []
        for start, end in ((0, 3), (3, 5), (5, 9)):
            given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
            with way() as calls:
                outputs.append(model(ids[:, start:end], past_key_values=cache, **given).logits)
        return torch.cat(outputs, 1), calls

    given, calls = run(counted_steps)
    assert calls.call_count == 1  # not the second pass, whose first position is padding in a row
    expected, _ = run(lambda: layer_by_layer(model))
    kept = mask.bool()
    assert (given - expected)[kept].abs().max() <= 1e-5 * expected[kept].abs().max()
