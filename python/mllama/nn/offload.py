"""Layers whose weights are in the host's memory, and on a device only while they compute."""

import threading
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

_ALIGNMENT = 256  # bytes, as allocators of devices align tensors


class Streams(Protocol):
    """The stream that a device computes on, and one that copies meanwhile. An event is a point of
    one of them, which the other can wait for; the host waits for neither.
    """

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """A copy on the host, in memory that the device reads by itself."""

    def start_copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Copy on the second stream, not before the event `after`. Returns the event of its end."""

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""

    def mark(self) -> Any:
        """The event of the end of what is computed so far."""


class CudaStreams:
    """`Streams` of a CUDA device: its current one, and one of its own."""

    def __init__(self, device: torch.device):
        self._device, self._copying = device, torch.cuda.Stream(device)

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().cpu().pin_memory()

    def start_copy(
        self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event
    ) -> torch.cuda.Event:
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(after)
            target.copy_(source, non_blocking=True)
            target.record_stream(self._copying)  # not free before, where the model is dropped
            return self._copying.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()


class _Buffer:
    """Memory on the device for one layer at a time.

    Attributes:
        layer: the index of the layer that is in it, or on its way; None at first.
        arrived: the event after which it is in it.
        free: the event after which its last use is over, also by who had the memory before.
    """

    def __init__(self, size: int, device: torch.device, streams: Streams):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.arrived: Any = None
        self.free = streams.mark()


class _Layer:
    """A layer with its weights in one block of the host's memory.

    Args:
        module: the layer.
        kept: modules in it whose weights stay where they are.
        streams: of the device.

    Attributes:
        weights: uint8 [n], all of them.
    """

    def __init__(self, module: nn.Module, kept: Collection[nn.Module], streams: Streams):
        tensors = (
            x
            for part in module.modules()
            if part not in kept
            for own in (part.parameters, part.buffers)
            for x in own(recurse=False)
        )
        self._tensors = list({id(x): x for x in tensors}.values())
        places, end = [], 0
        for x in self._tensors:
            places.append(end)
            end += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        weights = torch.zeros(end, dtype=torch.uint8, device="cpu")
        self._places = places
        for x, own in zip(self._tensors, self._views(weights), strict=True):
            own.copy_(x.detach())
        self.weights = streams.pin(weights)
        self.leave()

    def enter(self, memory: torch.Tensor) -> None:
        """Use the copy of the weights in a buffer."""
        for x, own in zip(self._tensors, self._views(memory), strict=True):
            x.data = own

    def leave(self) -> None:
        """Use those on the host, which are saved and counted."""
        self.enter(self.weights)

    def _views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a block of memory."""
        pairs = zip(self._tensors, self._places, strict=True)
        return [memory[at : at + x.nbytes].view(x.dtype).view(x.shape) for x, at in pairs]


class LayerOffload:
    """Keeps weights of layers that run one after the other on the host. Two buffers on the device
    take turns: while one layer computes, the next one is copied. After the last layer that is the
    first one, for the next pass.

    The layers are for inference: their weights are frozen, and differentiating through them raises.
    So does a second thread while one computes. The layers hold this object by their hooks.

    Args:
        layers: in the order in which they run.
        device: where they compute.
        streams: of the device.
        kept: modules in the layers whose weights stay where they are.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        device: torch.device,
        streams: Streams,
        kept: Collection[nn.Module] = (),
    ):
        self._streams = streams
        self._layers = [_Layer(module.requires_grad_(False), kept, streams) for module in layers]
        size = max(len(layer.weights) for layer in self._layers)
        self._buffers = [_Buffer(size, device, streams) for _ in range(min(2, len(layers)))]
        self._lock = threading.Lock()  # of the layer that computes
        self._owner = 0  # its thread
        self._inside: int | None = None  # its index
        for index, module in enumerate(layers):
            module.register_forward_pre_hook(partial(self._begin, index), with_kwargs=True)
            # Also after an error, so that the weights are found where they are saved.
            module.register_forward_hook(partial(self._end, index), always_call=True)

    @property
    def nbytes(self) -> int:
        """Of the buffers on the device."""
        return sum(buffer.memory.nbytes for buffer in self._buffers)

    def _begin(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Wait for a layer's weights, and start the copy of the next one's."""
        if torch.is_grad_enabled() and _want_gradient((*args, *kwargs.values())):
            raise ValueError(
                "layers whose weights are on the host (gpu_layers) are for inference: call the "
                "model under torch.no_grad()"
            )
        self._enter(index)
        buffer = self._find(index) or self._fetch(index, self._buffers[0])
        self._streams.wait(buffer.arrived)
        self._layers[index].enter(buffer.memory)
        following = (index + 1) % len(self._layers)
        if self._find(following) is None:
            self._fetch(following, next(one for one in self._buffers if one is not buffer))

    def _enter(self, index: int) -> None:
        """Let one thread in. A layer that it left without `_end`, by Ctrl-C, is over."""
        thread = threading.get_ident()
        if not self._lock.acquire(blocking=False):
            if self._owner != thread:
                raise RuntimeError(
                    "a model whose layers are on the host (gpu_layers) computes for one thread at "
                    "a time"
                )
            self._end(self._inside)
            self._lock.acquire()
        self._owner, self._inside = thread, index

    def _end(self, index: int | None, *call: Any) -> None:
        """Let the buffer go once what was launched is computed."""
        if index is None or (self._inside, self._owner) != (index, threading.get_ident()):
            return  # it was not let in
        self._layers[index].leave()
        if (buffer := self._find(index)) is not None:
            buffer.free = self._streams.mark()
        self._inside = None
        self._lock.release()

    def _find(self, index: int) -> _Buffer | None:
        return next((one for one in self._buffers if one.layer == index), None)

    def _fetch(self, index: int, buffer: _Buffer) -> _Buffer:
        weights = self._layers[index].weights
        target = buffer.memory[: len(weights)]
        buffer.arrived = self._streams.start_copy(target, weights, buffer.free)
        buffer.layer = index
        return buffer


def _want_gradient(values: Iterable[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in values)
