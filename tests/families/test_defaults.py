"""torch's default device and dtype change nothing: every tensor that is made says its own."""

from contextlib import contextmanager

import pytest
import torch

from mllama.ops.attention import attention
from tiny import pairs

DEFAULTS = [torch.device("meta"), torch.bfloat16, torch.float16, torch.float64]
LENGTH = {"max_new_tokens": 3, "pad_token_id": 0}


@contextmanager
def default(value: torch.device | torch.dtype):
    put, before = torch.set_default_dtype, torch.get_default_dtype()
    if isinstance(value, torch.device):
        put, before = torch.set_default_device, None
    put(value)
    try:
        yield
    finally:
        put(before)


def results(model, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        found = [model(**given)[0]]
        if "input_ids" in given:
            found.append(model(**given, labels=given["input_ids"]).loss)
            for options in (
                {"do_sample": False},
                {"num_beams": 2},
                {"use_cache": False},
                {"cache_implementation": "static"},
            ):
                found.append(model.generate(**given, **LENGTH, **options))
    return found


@pytest.mark.parametrize(
    "family", ["gemma", "llava, clip, -2", "paligemma", "mllama", "siglip_vision_model"]
)
def test_results_are_those_without(family, tmp_path):
    if family.startswith("siglip"):
        pair = pairs.pair(family)
        given = {"pixel_values": pair.images(2)}
    else:
        pair, given = pairs.with_inputs(family)
    torch.manual_seed(0)
    expected = results(pair.ours, given)
    for value in DEFAULTS:
        with default(value):
            pair.ours.save_pretrained(tmp_path)
            read = type(pair.ours).from_pretrained(tmp_path, dtype=torch.float32)
        read.reference = getattr(pair.ours, "reference", None) or "meta"
        for model in (pair.ours, read):
            torch.manual_seed(0)
            with default(value):
                got = results(model, given)
            for one, other in zip(got, expected, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)


def test_attention_whose_first_row_is_given_as_a_number():
    q = torch.randn(1, 2, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = attention(q, q, q, causal=True, query_offset=0)
    with default(torch.device("meta")):
        assert torch.equal(attention(q, q, q, causal=True, query_offset=0), expected)
