"""Sessions that answer each request with another adapter: nothing of one is used for another."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mllama
import tiny
from mllama.model.fast_decoder import FastDecoder
from mllama.runtime.session import Session
from tiny import pairs
from tiny.pairs import FAMILIES, pair

LENGTH = 8


def adapters(model: nn.Module, folder, **targets) -> dict:
    """Add adapters that say something; the file of each, by name."""
    files = {}
    for seed, (name, own) in enumerate(targets.items()):
        mllama.adapt(model, own, rank=2 + seed, name=name)
        torch.manual_seed(seed)
        for parameter in mllama.lora_parameters(model):
            nn.init.normal_(parameter, std=0.3)
        files[name] = folder / f"{name}.safetensors"
        mllama.save_lora(model, files[name])
    return files


def said(session: Session, inputs, **options) -> list[list[int]]:
    options = {"max_new_tokens": LENGTH, "eos_token_id": -1} | options
    return [row.token_ids for row in session.generate(inputs, **options).completions]


def alone(build, inputs, path=None) -> list[list[int]]:
    """What a session says whose model has this adapter alone, or none."""
    model = build()
    if path is not None:
        mllama.load_lora(model, path)
    return said(Session(model), inputs)


@pytest.mark.parametrize("case", FAMILIES)
def test_answers_are_those_of_a_session_with_that_adapter_alone(case, tmp_path):
    inputs, model = pair(case).inputs("one row"), pairs.make(case).ours
    targets = {"text": "all-linear", "small": ["attn[0]", "mlp[-1]"]}
    if model.spec.encoder is not None:
        targets["image"] = ["vision", "projector"]
    files = adapters(model, tmp_path, **targets)
    expected = {
        name: alone(lambda: pairs.make(case).ours, inputs, files.get(name))
        for name in (None, *files)
    }
    session = Session(model)
    for name in (*files, *reversed(files), *files):
        assert said(session, inputs, adapter=name) == expected[name], name
        assert said(session, inputs) == expected[[*files][-1]], "the one in use outside"
    with mllama.lora_disabled(model):
        assert said(session, inputs) == expected[None]


def test_prompts_are_reused_for_the_same_adapter_alone(tmp_path):
    model = pairs.make("llava, clip, -2").ours
    adapters(model, tmp_path, a="all-linear", b="attn")
    inputs, session = pair("llava, clip, -2").inputs("one row"), Session(model)
    length = inputs["input_ids"].shape[1]

    def reused(name: str) -> int:
        options = {"max_new_tokens": 4, "eos_token_id": -1}
        return session.generate(inputs, adapter=name, **options).num_reused_tokens

    assert [reused(name) for name in "aabba"] == [0, length - 1, 0, length - 1, 0]
    model.language_model.layers[0].self_attn.q_proj.alpha = 3  # noticed, as any change
    assert reused("a") == 0


@pytest.mark.parametrize("weights", ["int4", "int8", "bf16"])
def test_packed_models_swap_beside_decode_step(weights, tmp_path):
    def build():
        return mllama.optimize(pairs.make("llama").ours, weights)

    inputs, model = pair("llama").inputs("one row"), build()
    files = adapters(model, tmp_path, a="all-linear", b="attn")
    session = Session(model)
    for name in "abbaab":
        assert said(session, inputs, adapter=name) == alone(build, inputs, files[name])
        assert isinstance(model._fast, FastDecoder)


def test_batches_and_captured_images(tmp_path):
    model = pairs.make("mllama").ours
    adapters(model, tmp_path, a="cross_attn", b=["vision_global", "projector"])
    inputs = pair("mllama").inputs("two images")
    for name in "ab":
        other = pairs.make("mllama").ours
        mllama.load_lora(other, tmp_path / f"{name}.safetensors")
        session = Session(model)
        said(session, inputs, adapter="b" if name == "a" else "a")
        assert said(session, inputs, adapter=name) == said(Session(other), inputs)


def test_unknown_merged_and_missing_adapters_are_refused(tmp_path):
    model = tiny.model().eval()
    inputs, session = {"input_ids": torch.tensor([tiny.tokens(4)])}, Session(model)
    with pytest.raises(ValueError, match="no LoRA layers"):
        said(session, inputs, adapter="a")
    adapters(model, tmp_path, a="attn", b="attn")
    with pytest.raises(ValueError, match="'c'"):
        said(session, inputs, adapter="c")
    mllama.merge_lora(model)
    with pytest.raises(ValueError, match="merged"):
        said(session, inputs, adapter="a")


def test_a_failed_answer_leaves_the_adapter_in_use(tmp_path):
    model = tiny.model().eval()
    adapters(model, tmp_path, a="attn", b="attn")
    session = Session(model, processor=_Tokenizer())
    inputs = {"input_ids": torch.tensor([tiny.tokens(4)])}

    def stop(*call):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        session.generate(inputs, adapter="a", on_text=stop, eos_token_id=-1)
    assert mllama.lora_names(model) == ["b", "a"]
    assert said(session, inputs) == alone(
        lambda: tiny.model().eval(), inputs, tmp_path / "b.safetensors"
    )


def test_generate_of_transformers_takes_the_same_option(tmp_path):
    from mllama.hf.answering import GenerateSession

    model = pairs.make("llama").ours
    files = adapters(model, tmp_path, a="all-linear", b="attn")
    inputs, session = pair("llama").inputs("one row"), GenerateSession(model, _Tokenizer())
    for name in "ab":
        found = session.generate(inputs, adapter=name, max_new_tokens=4, eos_token_id=-1)
        expected = alone(lambda: pairs.make("llama").ours, inputs, files[name])
        assert [row.token_ids for row in found.completions] == [row[:4] for row in expected]


class _Tokenizer:
    eos_token_id = None
    chat_template = None

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def test_threads_take_turns():
    from mllama.hf.answering import GenerateSession

    model, inputs = pairs.make("llama").ours, pair("llama").inputs("one row")
    for name in ("a", "b"):
        mllama.adapt(model, "attn", name=name)
    for session in (Session(model), GenerateSession(model, _Tokenizer())):
        expected = said(session, inputs)
        with ThreadPoolExecutor(1) as pool:
            for adapter in (None, "a", "b"):
                with mllama.lora_active(model, "a"):
                    call = pool.submit(said, session, inputs, adapter=adapter)
                    with pytest.raises(RuntimeError, match="another thread"):
                        call.result()
            assert pool.submit(said, session, inputs, adapter="b").result() == expected
