"""What of torch.cuda captured passes need: one launch of many kernels, and copies to the host that
the device does not wait for.
"""

from collections.abc import Callable

import torch


class CudaStepGraph:
    """A function of static tensors, captured as a CUDA graph (torch.cuda.CUDAGraph).

    Args:
        run: reads and writes tensors of one device that stay where they are, and reads nothing on
            the host. It is run once before it is captured, since libraries allocate their
            workspaces at first.
        device: the tensors'.
    """

    def __init__(self, run: Callable[[], None], device: torch.device):
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                run()

    def replay(self) -> None:
        """Run the function again, on the device's current stream."""
        with torch.cuda.device(self._device):
            self._graph.replay()


def graph_class(device: torch.device) -> type[CudaStepGraph] | None:
    """What captures passes on a device; None where they run one operator after the other."""
    return CudaStepGraph if device.type == "cuda" else None


class HostCopy:
    """A copy of a tensor on the host. A device goes on with what is launched after it meanwhile.

    Args:
        x: it may be written to afterwards.
    """

    def __init__(self, x: torch.Tensor):
        self._event = torch.cuda.Event() if x.is_cuda else None
        self._values = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        self._values.copy_(x, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(x.device))

    def tolist(self) -> list:
        """The values, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
