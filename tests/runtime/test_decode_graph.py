"""Captured passes against passes that run one operator after the other."""

import copy
import itertools

import pytest
import torch

import devices
import tiny
from helpers import needs_kernels
from mllama.quant.packer import optimize
from mllama.runtime import decode_graph
from mllama.runtime.session import Session
from step_graphs import RecordedGraph, captured_passes
from tiny import pairs

LENGTH = 8
CASES = [
    ("llama", "one row"),
    ("llama", "no image"),
    ("gemma", "no image"),
    ("gemma2", "no image"),
    ("gemma3_text", "one row"),
    ("llava, clip, -2", pairs.MIXED),
    ("paligemma", "one image"),
    *(("mllama", rows) for rows in pairs.TILED_ROWS),
]


def tokens(session: Session, inputs: dict, **options) -> list[list[int]]:
    options = {"max_new_tokens": LENGTH} | options
    return [row.token_ids for row in session.generate(inputs, **options).completions]


def check(model, inputs: dict, kv_cache: str | None = None, **options) -> None:
    """A captured pass, replayed for every token but the first, says what others do."""
    expected = tokens(Session(model, kv_cache=kv_cache), inputs, **options)
    with captured_passes() as counted:
        assert tokens(Session(model, kv_cache=kv_cache), inputs, **options) == expected
    assert (counted.captures, counted.replays) == (1, max(map(len, expected)) - 1)


@pytest.mark.parametrize(("case", "rows"), CASES)
def test_every_family(case, rows):
    both = pairs.pair(case)
    check(both.ours, both.inputs(rows))


@needs_kernels
@pytest.mark.parametrize("weights", ["f32", "int4"])
@pytest.mark.parametrize(("case", "rows"), CASES)
def test_packed(case, rows, weights):
    both = pairs.pair(case)
    check(optimize(copy.deepcopy(both.ours), weights), both.inputs(rows))


@pytest.mark.parametrize("each", [0, 1])
@pytest.mark.parametrize(
    "model",
    [tiny.prepend(num_image_tokens=3), tiny.crossed()],
    ids=["tokens before the text", "added layers"],
)
def test_images_without_placeholders(model, each):
    check(model, tiny.texts() | ({"pixel_values": tiny.images(2 * each)} if each else {}))


@pytest.mark.parametrize("kv_cache", ["int8", "bf16"])
@pytest.mark.parametrize("case", ["llama", "mllama"])
def test_a_cache_of_another_dtype(case, kv_cache):
    check(pairs.pair(case).ours, pairs.pair(case).inputs(), kv_cache)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "seed": 3},
        {"top_p": 0.9, "seed": [1, 2]},
        {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 4},
        {"do_sample": False, "repetition_penalty": 1.8},
    ],
)
def test_draws_and_penalties(options):
    check(pairs.pair("llama").ours, pairs.pair("llama").inputs(), **options)


def test_ends():
    model, inputs = pairs.pair("llama").ours, pairs.pair("llama").inputs("no image")
    rows = tokens(Session(model), inputs)
    end = rows[0][3]
    expected = tokens(Session(model), inputs, eos_token_id=end)
    with captured_passes() as counted:
        session = Session(model)
        assert tokens(session, inputs, eos_token_id=end) == expected
        # One pass ran ahead, where not all of them were needed.
        longest = max(map(len, expected))
        assert counted.replays == min(longest, LENGTH - 1)
        one = pairs.pair("llama").inputs("one row")
        text = tokens(session, one)[0]
        ends = tokens(session, one, eos_token_id=text[2])[0]
        assert ends == text[:3]
        again = {"input_ids": torch.tensor([one["input_ids"][0].tolist() + ends + [5, 6]])}
        result = session.generate(again, max_new_tokens=LENGTH)
        # The end was put in by the pass that ran ahead, and taken out again.
        assert result.num_reused_tokens == one["input_ids"].shape[1] + 2
        assert result.completions[0].token_ids == tokens(Session(model), again)[0]


def test_a_graph_is_kept_as_long_as_its_tensors():
    model = pairs.make("llama").ours
    short, longer = ({"input_ids": torch.tensor([tiny.tokens(n)])} for n in (9, 40))
    with captured_passes() as counted:
        session = Session(model)

        def captures(inputs, **options) -> int:
            """How many one call makes; its tokens are those of a fresh session."""
            before = counted.captures
            with captured_passes():
                expected = tokens(Session(model), inputs, **options)
            assert tokens(session, inputs, **options) == expected
            return counted.captures - before

        assert captures(short) == 1
        assert captures(short) == 0
        assert captures(short, max_new_tokens=5) == 0
        assert captures(short, repetition_penalty=1.5) == 1
        assert captures(longer) == 1  # the buffers moved
        assert captures(short, repetition_penalty=1.5) == 1
        assert captures(short) == 1
        with torch.no_grad():
            model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
        session.reset()
        assert captures(short) == 1
        batch = {"input_ids": torch.tensor([tiny.tokens(9), tiny.tokens(9)[::-1]])}
        assert captures(batch) == 1
        assert captures(batch) == 0  # its buffers stay


def test_changed_weights_are_noticed_without_a_reset():
    model, inputs = pairs.make("llama").ours, pairs.pair("llama").inputs("no image")
    with captured_passes() as counted:
        session = Session(model)
        tokens(session, inputs)
        with torch.no_grad():
            model.language_model.norm.weight.mul_(-1)
        assert tokens(session, inputs) == tokens(Session(model), inputs)
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
        assert tokens(session, inputs) == tokens(Session(model), inputs)
    assert counted.captures == 5


@pytest.mark.parametrize(
    "why", ["a hook", "a forward", "training", "autocast", "drafts", "foreign"]
)
def test_what_cannot_be_captured_runs_as_before(why, monkeypatch):
    model, inputs = pairs.make("llama").ours, pairs.pair("llama").inputs("one row")
    layer, options = model.language_model.layers[0], {}
    cast = torch.autocast("cpu", enabled=why == "autocast")
    if why == "a hook":
        layer.mlp.register_forward_hook(lambda module, given, output: output * 0.5)
    elif why == "a forward":
        forward = layer.mlp.forward
        layer.mlp.forward = lambda *given, **named: forward(*given, **named) * 0.5
    elif why == "training":
        model.train()
    elif why == "foreign":
        monkeypatch.setattr(type(layer.mlp), "__module__", "peft.tuners")
    elif why == "drafts":
        options = {"prompt_lookup_tokens": 3}
    with cast:
        expected = tokens(Session(model, **options), inputs)
        with captured_passes() as counted:
            assert tokens(Session(model, **options), inputs) == expected
    assert counted.captures == 0


def test_a_failed_capture_says_how_to_do_without(monkeypatch):
    model, inputs = pairs.pair("llama").ours, pairs.pair("llama").inputs("one row")

    def fail(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "graph_class", lambda device: fail)
    session = Session(model)
    with pytest.raises(RuntimeError, match="capturing") as raised:
        tokens(session, inputs)
    assert "MLLAMA_DISABLE_GRAPHS=1" in raised.value.__notes__[0]
    monkeypatch.setenv("MLLAMA_DISABLE_GRAPHS", "1")
    assert tokens(session, inputs) == tokens(Session(model), inputs)


class Stop(Exception):
    pass


@pytest.mark.parametrize("rows", ["one row", "no image"])
def test_an_interrupted_answer_leaves_what_is_complete(rows):
    model, inputs = pairs.pair("llama").ours, pairs.pair("llama").inputs(rows)
    expected = tokens(Session(model), inputs)
    seen = []

    def interrupt(stage, done, total):
        seen.append((stage, done))
        if stage == "decode" and done >= 3 * len(expected):
            raise Stop

    with captured_passes():
        session = Session(model, progress=interrupt)
        with pytest.raises(Stop):
            session.generate(inputs, max_new_tokens=LENGTH)
        session.progress = None
        assert tokens(session, inputs) == expected


def test_logits_that_are_no_distribution(monkeypatch):
    model, inputs = pairs.pair("llama").ours, pairs.pair("llama").inputs("one row")
    select = decode_graph.select_again

    def on_a_device(logits, *rest):
        """What kernels of a device return in place of an error."""
        return torch.full_like(select(logits, *rest), -1)

    monkeypatch.setattr(decode_graph, "select_again", on_a_device)
    with captured_passes():
        session = Session(model)
        with pytest.raises(ValueError, match="finite maximum"):
            tokens(session, inputs, temperature=1.0, seed=1)
        monkeypatch.undo()
    assert tokens(session, inputs) == tokens(Session(model), inputs)


def test_the_double_refuses_what_a_graph_would_not_do():
    x, numbers = torch.zeros(4), itertools.count()
    places = itertools.cycle([torch.ones(4), torch.ones(4)])
    for run in (lambda: x.add_(next(numbers)), lambda: x.add_(next(places))):
        graph = RecordedGraph(run, x.device)
        with pytest.raises(AssertionError):
            graph.replay()
    with pytest.raises(AssertionError, match="on the host"):
        RecordedGraph(lambda: x.add_(x[0].item()), x.device)


def test_on_a_cpu_nothing_is_captured():
    assert decode_graph.graph_class(torch.device("cpu")) is None
    assert decode_graph.graph_class(torch.device("cuda:1")) is not None


@pytest.mark.skipif(devices.tensor_device() == "cpu", reason="needs --device=cuda")
@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize(("case", "rows"), CASES)
def test_on_a_gpu(case, rows, weights, monkeypatch):
    model = copy.deepcopy(pairs.pair(case).ours).to("cuda")
    model = model if weights is None else optimize(model, weights)
    inputs = pairs.pair(case).inputs(rows)
    for options in ({}, {"top_p": 0.9, "repetition_penalty": 1.3, "seed": 3}):
        session = Session(model)
        found = [tokens(session, inputs, **options) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(decode_graph, "graph_class", lambda device: None)
            expected = tokens(Session(model), inputs, **options)
        assert found == [expected, expected]
