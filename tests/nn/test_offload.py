"""Layers on the host, on streams that run copies as early or as late as they may."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import devices
import mllama
from mllama.model.offload import device_of_each, offload
from mllama.nn.offload import LayerOffload, _Layer
from mllama.runtime.session import Session
from tiny import pairs

CPU = torch.device("cpu")


@dataclass(eq=False)
class Event:
    """A point of a stream: `time` counts what was computed before it; `run` is a copy."""

    time: int
    run: Callable[[], object] = bool


class LateStreams(TorchDispatchMode):
    """`Streams` of a CPU. A copy runs when someone waits for it, or at once. Every operator is
    checked: it must not touch memory that a copy is still writing, and a copy must wait for the
    last operator that touched its target.

    Args:
        late: whether copies run as late as they may.

    Attributes:
        copies: how many were started.
    """

    def __init__(self, late: bool):
        super().__init__()
        self.copies = 0
        self._late, self._time, self._copying = late, 0, False
        self._on_host: set[int] = set()
        self._used: dict[int, int] = {}  # by the storage's address: when an operator last did
        self._pending: dict[int, Event] = {}

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        pinned = x.clone()
        self._on_host.add(_place(pinned))
        return pinned

    def start_copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        self.copies += 1
        used = self._used.get(_place(target), 0)
        assert used <= after.time, "a buffer is overwritten while in use"
        event = Event(self._time, lambda: target.copy_(source))
        self._pending[_place(target)] = event
        if not self._late:
            self.wait(event)
        return event

    def wait(self, event: Event) -> None:
        for place in [place for place, one in self._pending.items() if one is event]:
            del self._pending[place]
            self._copying = True
            event.run()
            self._copying = False

    def mark(self) -> Event:
        return Event(self._time)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        places = {_place(x) for x in _tensors((args, kwargs))}
        in_place = func.overloadpacket.__name__.endswith("_")
        views = not in_place and all(_place(x) in places for x in _tensors(result))
        if self._copying or views:
            return result
        self._time += 1
        for place in places:
            assert place not in self._on_host, f"{func} computes on the host's memory"
            assert place not in self._pending, f"{func} uses a buffer before its copy"
            self._used[place] = self._time
        return result


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def answers(model, inputs: dict) -> list[list[int]]:
    session = Session(model)
    found = [session.generate(inputs, max_new_tokens=5) for _ in range(2)]
    return [row.token_ids for one in found for row in one.completions]


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("gpu_layers", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("case", ["llama", "mllama"])
def test_a_model_computes_what_it_does_without(case, gpu_layers, late):
    text = {"num_hidden_layers": 5} if case == "llama" else {}
    model = pairs.make(case, **text).ours
    inputs = pairs.pair(case).inputs("one row")
    expected = answers(model, inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    streams = LateStreams(late)
    offload(model, gpu_layers, CPU, lambda device: streams)
    with streams:
        assert answers(model, inputs) == expected
    count = len(model.language_model.layers) - gpu_layers
    passes = 10 if count > 2 else 1  # two layers stay in the buffers
    assert streams.copies == count * passes + (count > 2)  # the first layer, for the next pass
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.skipif(devices.tensor_device() == "cpu", reason="needs --device=cuda")
@pytest.mark.parametrize("gpu_layers", [0, 1, 4])
def test_on_a_gpu(gpu_layers):
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = pairs.pair("mllama").inputs("one row")
    expected = answers(pairs.make("mllama").ours.to(device), inputs)
    model = pairs.make("mllama").ours.to(device)
    offload(model, gpu_layers, device)
    assert answers(model, inputs) == expected


@pytest.mark.parametrize("sizes", [[8, 64, 16], [64, 8, 8, 8]])
def test_layers_of_different_sizes(sizes):
    layers = [torch.nn.Sequential(torch.nn.Linear(8, n), torch.nn.Linear(n, 8)) for n in sizes]
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = run(layers, x)
        streams = LateStreams(True)
        offload_all(layers, streams)
        with streams:
            for _ in range(3):
                assert torch.equal(run(layers, x), expected)


def run(layers, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def offload_all(layers, streams) -> LayerOffload:
    return LayerOffload(layers, CPU, streams)


def test_layers_out_of_order_and_after_an_error():
    layers = [torch.nn.Linear(8, 8) for _ in range(4)]
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = [layer(x) for layer in layers]
        streams = LateStreams(True)
        offload_all(layers, streams)
        with streams:
            for index in (3, 0, 2, 2, 1, 0, 3):
                assert torch.equal(layers[index](x), expected[index])
                with pytest.raises(RuntimeError):
                    layers[index](x[:, :3])


class Interrupted(torch.nn.Linear):
    """Raises what hooks are not told of, once."""

    interrupts = True

    def forward(self, x):
        y = super().forward(x)
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        return y


def test_an_interrupted_pass():
    layers = [torch.nn.Linear(8, 8), Interrupted(8, 8), *(torch.nn.Linear(8, 8) for _ in range(3))]
    x = torch.randn(2, 8)
    streams = LateStreams(True)
    offload_all(layers, streams)
    with torch.no_grad(), streams:
        with pytest.raises(KeyboardInterrupt):
            run(layers, x)
        found = run(layers, x)
    assert torch.equal(found, run([torch.nn.Linear.forward.__get__(one) for one in layers], x))


def test_another_thread_is_refused():
    refused = []

    class Asks(torch.nn.Linear):
        def forward(self, x):
            other = threading.Thread(target=self.ask, args=(x,))
            other.start()
            other.join()
            return super().forward(x)

        def ask(self, x):
            with pytest.raises(RuntimeError, match="one thread") as error:
                layers[0](x)
            refused.append(error.value)

    layers = [torch.nn.Linear(8, 8), Asks(8, 8), torch.nn.Linear(8, 8)]
    offload_all(layers, LateStreams(False))
    with torch.no_grad():
        for _ in range(2):
            run(layers, torch.randn(2, 8))
    assert len(refused) == 2


def test_buffers_are_two_layers():
    layers = [torch.nn.Linear(8, 8, bias=False) for _ in range(5)]
    assert offload_all(layers, LateStreams(True)).nbytes == 2 * 8 * 8 * 4
    assert not any(layer.weight.requires_grad for layer in layers)


@pytest.mark.parametrize(
    ("name", "text"),
    [("wait", "before its copy"), ("mark", "while in use"), ("enter", "on the host")],
)
def test_the_double_sees_what_goes_wrong(name, text, monkeypatch):
    layers, streams = [torch.nn.Linear(8, 8) for _ in range(4)], LateStreams(True)
    broken = {
        "wait": (streams, lambda event: None),
        "mark": (streams, lambda: Event(0)),
        "enter": (_Layer, lambda self, memory: None),
    }
    offload_all(layers, streams)
    owner, instead = broken[name]
    monkeypatch.setattr(owner, name, instead)
    x = torch.randn(2, 8)
    with streams, torch.no_grad(), pytest.raises(AssertionError, match=text):
        run(layers, run(layers, x))


def test_gradients_are_refused():
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    offload_all(layers, LateStreams(False))
    with pytest.raises(ValueError, match="gpu_layers"):
        run(layers, torch.randn(2, 8, requires_grad=True))


def test_what_only_images_pass_stays():
    model, device = pairs.pair("mllama").ours, torch.device("cuda:1")
    of = device_of_each(model, 1, device)
    where = {name: of(name) for name in model.state_dict()}
    on_host = {name for name, place in where.items() if place == CPU}
    assert where["language_model.layers.0.mlp.up_proj.weight"] == device
    assert "language_model.layers.1.cross_attn.q_proj.weight" in on_host
    assert where["language_model.layers.1.cross_attn.k_proj.weight"] == device
    assert all(name.startswith("language_model.layers.") for name in on_host)
    assert set(map(device_of_each(model, None, device), where)) == {device}
    assert of("language_model.layers.2.mlp.up_proj") == CPU


@pytest.mark.parametrize(("given", "kind"), [(-1, ValueError), (1, ValueError), (True, TypeError)])
def test_what_is_refused(given, kind, model_folder):
    with pytest.raises(kind, match="gpu_layers"):
        mllama.load(model_folder, device="cpu", gpu_layers=given)
