"""The cache goes by two names, under every supported release of transformers."""

import logging
import warnings

import pytest
import torch
from transformers import DynamicCache

import tiny
from mllama.hf import compat

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def quiet(caplog):
    """Fail where our own code makes transformers warn of a name."""
    caplog.set_level(logging.WARNING, logger="transformers")
    logging.getLogger("transformers").addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_forward_takes_and_gives_the_cache_by_either_name(name, quiet):
    model, ids = tiny.model(), torch.tensor([tiny.tokens(6)])
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        held = getattr(first, name)
        assert first[name] is held and first.get(name) is held and name in first
        assert held is first.cache is first.past_key_values and list(first) == ["logits", "cache"]
        rest = model(ids[:, 4:], **{name: held}).logits
        decoded = model.base_model(ids, **{name: DynamicCache()})
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)
    assert getattr(decoded, name).get_seq_length() == 6
    assert name not in model(ids, use_cache=False) and model(ids, use_cache=False).get(name) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}])
def test_generate_takes_either_name(name, options, quiet):
    model, ids = tiny.model(), torch.tensor([tiny.tokens(6)])
    # transformers 5.24 warns where its own output is read by the old name, so read the new one
    torch.manual_seed(1)
    expected = model.generate(ids, **GREEDY | options)
    cache = DynamicCache()
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **GREEDY | options, **{name: cache}), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_step_of_generate_takes_either_name(name, quiet):
    model, ids, cache = tiny.model(), torch.tensor([tiny.tokens(6)]), DynamicCache()
    model(ids[:, :5], cache=cache)
    step = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **{name: cache})
    assert step["past_key_values"] is cache and step["input_ids"].tolist() == ids[:, 5:].tolist()


def test_both_names_at_once_are_refused():
    model, ids = tiny.model(), torch.tensor([tiny.tokens(3)])
    both = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    for call in (model, model.generate, model.base_model):
        with pytest.raises(ValueError, match="cache and past_key_values"):
            call(ids, **both)


def test_an_output_is_written_by_either_name():
    cache = DynamicCache()
    output = compat.DecoderOutput(last_hidden_state=torch.ones(1, 1, 1))
    assert "cache" not in output and "past_key_values" not in output
    output.past_key_values = cache
    assert output.cache is cache and output["cache"] is cache and len(output.to_tuple()) == 2
    output["past_key_values"] = (other := DynamicCache())
    assert output.cache is other and output[1] is other
