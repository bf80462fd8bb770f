"""Captured passes on CUDA devices that are not there: they read nothing on the host."""

import functools
from dataclasses import replace

import pytest
import torch

import mllama
from fake_devices import DEVICES, OneDevice, fake_cuda
from helpers import needs_kernels
from mllama.config.spec import ModelSpec
from mllama.fusion.base import DecoderInputs
from mllama.fusion.cross_context import CrossAttentionContext, Segment
from mllama.model.fast_decoder import FastDecoder
from mllama.model.model import VisionLanguageModel
from mllama.nn.kv_cache import CACHE_DTYPES, KVCache
from mllama.nn.static_cache import StaticCache
from mllama.quant.packer import optimize
from mllama.runtime.decode_graph import Step, StepTensors
from mllama.runtime.sampler import Sampling
from tiny import pairs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its devices are there")
ROWS, PAST, IMAGE_KEYS = 2, 5, 6
SAMPLED = Sampling(True, 0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
CASES = ["llama", "gemma", "gemma2", "gemma3_text", "mllama"]


@functools.cache
def spec_of(case: str) -> ModelSpec:
    """Not tied: values of tied weights are compared."""
    spec = pairs.pair(case).ours.spec
    return replace(spec, text=replace(spec.text, tie_word_embeddings=False))


def make_model(spec: ModelSpec, device: str) -> VisionLanguageModel:
    """One without values."""
    with torch.device(device):
        model = VisionLanguageModel(spec).eval()
    for rotary in model.language_model.rotary:
        rotary.frequencies = rotary.frequencies.to(device)
    return model.requires_grad_(False)


def make_step(model, device: str, sampling: Sampling, kv_cache: str | None = None) -> Step:
    """A pass behind `PAST` positions."""
    text = model.spec.text
    cross = text.cross_attention_layers
    size = (text.num_key_value_heads, text.head_dim)
    cache = KVCache(text.num_hidden_layers, dtype=kv_cache and CACHE_DTYPES[kv_cache])
    context = None
    for layer in range(text.num_hidden_layers):
        count = IMAGE_KEYS if layer in cross else PAST
        kv = torch.zeros(ROWS, count, *size, device=device)
        (cache.update_cross if layer in cross else cache.update)(layer, kv, kv)
    if cross:
        visible = torch.ones(ROWS, IMAGE_KEYS, dtype=torch.bool, device=device)
        sees_image = torch.ones(ROWS, 1, 1, dtype=torch.bool, device=device)
        tiles = torch.ones(1, dtype=torch.bool, device="cpu")
        context = CrossAttentionContext(None, tiles, (Segment(0, 1, visible),), sees_image)
    mask = torch.ones(ROWS, PAST + 1, device=device)
    prepared = DecoderInputs(torch.empty(0, device=device), mask, cross=context)
    static = StaticCache(cache, 3, cross)
    tokens = torch.zeros(ROWS, dtype=torch.long, device=device)
    present = torch.zeros(ROWS, text.vocab_size, dtype=torch.bool, device=device)
    if sampling.greedy:
        present = None
    first = StepTensors.of(tokens, prepared, static, present, sampling.greedy)
    return Step(model, first.copy(), prepared, None, static, sampling)


def check_run(step: Step, device: str) -> None:
    with OneDevice():
        step.run()
    assert {x.device for _, x in step.tensors.items()} == {torch.device(device)}


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_pass_reads_nothing_on_the_host(device, case, sampling, kernels):
    spec = spec_of(case)
    with fake_cuda(kernels):
        check_run(make_step(make_model(spec, device), device, sampling), device)


@pytest.mark.parametrize("kv_cache", ["int8", "bf16"])
@torch.inference_mode()
def test_a_cache_of_another_dtype(kv_cache):
    spec = spec_of("llama")
    with fake_cuda():
        check_run(make_step(make_model(spec, "cuda:1"), "cuda:1", Sampling(), kv_cache), "cuda:1")


@needs_kernels
@pytest.mark.parametrize("weights", ["int4", "bf16"])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_packed_weights_on_a_device(case, weights):
    spec = spec_of(case)
    with fake_cuda(kernels=True):
        model = make_model(spec, "cuda:1")
        packed = optimize(model, weights)
        assert {x.device for x in packed.buffers()} == {torch.device("cuda:1")}
        step = make_step(packed, "cuda:1", SAMPLED)
        check_run(step, "cuda:1")
        if (
            case != "mllama"
        ):  # gates of its layers are read when a decoder is described, not in a pass
            step.fast = FastDecoder(packed.language_model)
            check_run(step, "cuda:1")


@needs_kernels
@torch.inference_mode()
def test_adapters_beside_packed_weights():
    spec = spec_of("llama")
    with fake_cuda(kernels=True):
        model = optimize(make_model(spec, "cuda:1"), "int4")
        mllama.convert_linears_to_lora(model.language_model, rank=2, alpha=4)
        assert {x.device for x in model.parameters()} == {torch.device("cuda:1")}
        check_run(make_step(model.eval(), "cuda:1", Sampling()), "cuda:1")


def test_a_device_without_kernels_is_refused_by_name():
    spec = spec_of("llama")
    with fake_cuda(), pytest.raises(ValueError, match="cuda:1"):
        optimize(make_model(spec, "cuda:1"), "int4")


@torch.inference_mode()
def test_the_test_sees_what_reads_on_the_host():
    with fake_cuda():
        length = torch.full((1,), 3, device="cuda:0")
        for read in (int, bool, torch.Tensor.tolist, torch.Tensor.nonzero):
            with pytest.raises(RuntimeError):
                read(length)
        with pytest.raises(AssertionError, match="several devices"), OneDevice():
            torch.zeros(3, device="cpu").to("cuda:0")


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])
@torch.inference_mode()
def test_a_model_on_two_devices_is_refused_by_name(kernels):
    spec = spec_of("llama")
    with fake_cuda(kernels):
        model = make_model(spec, "cuda:0")
        step = make_step(model, "cuda:0", Sampling())
        layer = model.language_model.layers[1]
        layer.input_layernorm.weight = torch.nn.Parameter(
            torch.ones(model.spec.text.hidden_size, device="cuda:1"), requires_grad=False
        )
        with pytest.raises(ValueError, match=r"on cuda:1, .* on cuda:0"):
            step.run()
