"""`decode_step` on its CUDA kernels: every family's decoder against its layers in plain torch, long
caches, every architecture, and what the host may not know. tests/model/test_fast_decoder.py and
test_fast_positions.py run on these kernels too, but take long.
"""

import contextlib
import copy
import itertools

import pytest
import torch

import devices
import emulated
import mllama
from helpers import counted_steps
from mllama.fusion.base import ModelInputs
from mllama.lora.layer import lora_layers
from mllama.model.fast_decoder import FastDecoder
from mllama.nn.kv_cache import CACHE_DTYPES, KVCache
from mllama.ops import _dispatch
from mllama.ops.decode import decode_step
from mllama.quant.packer import RECIPES, optimize
from mllama.runtime.progress import Stages
from mllama.runtime.session import Session
from tiny import pairs

PAST, NEW = 251, 9  # new positions begin in one part of the keys and end in the next
TOLERANCE = {"f32": 1e-5, "bf16": 3e-2, "f16": 3e-2, "int8": 3e-2}


FLOATS = ("f32", "bf16", "f16")


def packed(case: str, weights: str = "f32"):
    """A packed model whose gates are open, if it has any."""
    model = copy.deepcopy(pairs.pair(case).ours)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return optimize(model, weights)


@contextlib.contextmanager
def plain_torch():
    """Run every operator's reference, layer by layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "_EXTENSION", None)
        yield


@torch.inference_mode()
def check(model, inputs, tolerance=1e-5, kv_cache=None):
    """Logits of three positions behind a prompt, alone and beside each other."""

    def logits_of(*parts):
        prompt = (session := Session(model, kv_cache=kv_cache))._prompt
        with plain_torch():
            prompt.prefill(session._take_inputs(inputs), Stages())
        return lambda: torch.cat([prompt.append(part) for part in parts], 1)

    new = torch.tensor([[5, 6, 7]]).expand(len(inputs["input_ids"]), 3)
    with counted_steps() as calls:
        alone, together = logits_of(*new.split(1, 1))(), logits_of(new)()
    assert calls.call_count == 4 and torch.equal(alone, together)
    by_layers = logits_of(new)
    with plain_torch():
        expected = by_layers()
    assert (alone - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", pairs.ONE_EACH)
def test_every_family(case):
    check(packed(case), pairs.pair(case).inputs(pairs.MIXED))


@pytest.mark.parametrize("rows", pairs.TILED_ROWS)
def test_layers_that_attend_to_images(rows):
    check(packed("mllama"), pairs.pair("mllama").inputs(rows))


@pytest.mark.parametrize("weights", RECIPES)
def test_every_format(weights):
    # Activations of the two ways are rounded apart where they differ in the last bit.
    tolerance = 1e-5 if RECIPES[weights].decoder in FLOATS else 3e-2
    check(packed("gemma2", weights), pairs.pair("gemma2").inputs("one row"), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters(dtype):
    model = packed("llama", "int4")
    mllama.convert_linears_to_lora(model, rank=3, alpha=6)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model.language_model).values():
        for part in layer.adapter():
            part.data = (torch.randn(part.shape, generator=generator) / 8).to(dtype)
    check(model.eval(), pairs.pair("llama").inputs(), 3e-2)


# ---- long caches


def random_cache(model, batch: int, kv_cache: str, capacity: int = 0) -> KVCache:
    """A cache with PAST random positions."""
    spec, generator = model.spec.text, torch.Generator().manual_seed(0)
    cache = KVCache(spec.num_hidden_layers, capacity, CACHE_DTYPES[kv_cache])
    for layer in range(spec.num_hidden_layers):
        shape = 2, batch, PAST, spec.num_key_value_heads, spec.head_dim
        cache.update(layer, *torch.randn(shape, generator=generator))
    return cache


@torch.no_grad()
def logits_of(model, sizes, batch=1, kv_cache="f32", capacity=0) -> torch.Tensor:
    """Logits of NEW positions behind a random cache, in passes of these sizes."""
    cache = random_cache(model, batch, kv_cache, capacity)
    ids = torch.randint(1, 90, (batch, NEW), generator=torch.Generator().manual_seed(1))
    passes = [model.compute(ModelInputs(part, cache=cache)).logits for part in ids.split(sizes, 1)]
    return torch.cat(passes, 1)


# Rows of int8 caches are read in words where their size allows it: 68 bytes for heads of 64.
CACHES = [*itertools.product(["llama", "gemma2"], TOLERANCE), ("gemma, as many key heads", "int8")]


@pytest.mark.parametrize(("case", "kv_cache"), CACHES)
def test_parts_of_the_keys(case, kv_cache):
    model = packed(case)
    with counted_steps() as calls:
        alone = logits_of(model, [1] * NEW, kv_cache=kv_cache)
    assert calls.call_count == NEW
    assert torch.equal(logits_of(model, [4, 5], kv_cache=kv_cache), alone)
    assert torch.equal(logits_of(model, [NEW], kv_cache=kv_cache, capacity=700), alone)
    with plain_torch():
        expected = logits_of(model, [NEW], kv_cache=kv_cache)
    assert (alone - expected).abs().max() <= TOLERANCE[kv_cache] * expected.abs().max()


def test_rows_of_codes_that_end_their_buffer():
    """44 bytes for heads of 40, in tiles of 64 columns; nothing is behind the last one."""
    model = optimize(pairs.make("llama", head_dim=40).ours, "f32")
    exact = logits_of(model, [NEW], kv_cache="int8", capacity=PAST + NEW)
    with plain_torch():
        expected = logits_of(model, [NEW], kv_cache="int8")
    assert (exact - expected).abs().max() <= TOLERANCE["int8"] * expected.abs().max()


@pytest.mark.parametrize("architecture", [75, 86, 90])
@pytest.mark.parametrize("kv_cache", TOLERANCE)
def test_architecture(architecture, kv_cache):
    if devices.is_compiled() and (architecture < 80) != (emulated.architecture() < 80):
        pytest.skip(f"the kernels were compiled for sm_{emulated.architecture()}")
    emulated.set_options(architecture=architecture)
    model = packed("gemma3_text", "int4")
    both = logits_of(model, [1, NEW - 1], 2, kv_cache)
    assert torch.equal(logits_of(model, [NEW - 1, 1], 2, kv_cache), both)
    with plain_torch():
        expected = logits_of(model, [NEW], 2, kv_cache)
    assert (both - expected).abs().max() <= 3e-2 * expected.abs().max()


# ---- what the host may not know


def arguments_of(model, length: int, rows: int = 1, **options) -> dict:
    """Arguments of `decode_step` for a cache with room for 600 positions."""
    model._fast = FastDecoder(model.language_model)
    spec, generator = model.spec.text, torch.Generator().manual_seed(0)
    shape = rows, spec.num_key_value_heads, 600, spec.head_dim
    keys, values = torch.randn(2, spec.num_hidden_layers, *shape, generator=generator)
    return {
        "decoder": model._fast._handle,
        "hidden": torch.randn(rows, 1, spec.hidden_size, generator=generator),
        "positions": torch.full((rows, 1), length),
        "keys": list(keys),
        "values": list(values),
        "length": torch.tensor([length]),
        "first_key": None,
        "image_keys": 0,
        "image_mask": None,
        "sees_image": None,
    } | options


def test_launches_do_not_depend_on_the_length():
    """So that a CUDA graph of them can be replayed with another."""
    model, counts = packed("llama", "int4"), []
    for length in (0, 3, 300, 599):
        emulated.take_counters()
        decode_step(**arguments_of(model, length))
        counters = emulated.take_counters()
        counts.append((counters.launches, counters.blocks, counters.threads))
    assert counts[0][0] > 0 and counts == [counts[0]] * 4


@pytest.mark.parametrize(
    "change",
    [
        {"length": torch.tensor([600])},
        {"length": torch.tensor([-1])},
        {"first_key": torch.tensor([6])},
        {"first_key": torch.tensor([-1])},
    ],
    ids=str,
)
def test_numbers_on_the_device_that_do_not_fit(change):
    model = packed("llama")
    arguments = arguments_of(model, 5)
    decode_step(**arguments)
    text = "trap" if devices.is_compiled() else "decode_step: " + next(iter(change))
    with pytest.raises(RuntimeError, match=text):
        decode_step(**arguments | change)


def test_more_rows_than_a_step_takes():
    model = packed("llama")
    with pytest.raises((ValueError, RuntimeError), match="decode_step: invalid hidden"):
        decode_step(**arguments_of(model, 5, 17))
