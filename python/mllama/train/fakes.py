"""A training step without memory: parameters and activations have shapes and no values."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mllama.train.allocations import AllocationTracker

Batch = Mapping[str, Any]


class Steps:
    """Optimizer steps of a model on the meta device, computed with fake tensors to count bytes.

    The batch is real, since its ids and masks decide what is computed; what depends on parameters
    has shapes alone. All that torch allocates is counted, by the very code that trains; memory
    that kernels of libraries take for themselves is not.

    Args:
        model: a model on the meta device, in training mode; its parameters become fake.
        optimizer: makes the optimizer of the trained parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Any):
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = model
        self._make_fake()
        text = model.spec.text
        self._tracker = AllocationTracker(text.vocab_size)
        self._trained = [one for one in model.parameters() if one.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            self._tracker.note(tensor, "adapters" if tensor.requires_grad else "weights")
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: self._tracker.note(parameter.grad, "gradients")
            )
        self._optimizer = optimizer(self._trained)

    def peak(self, batch: Batch, accumulation: int, max_grad_norm: float | None) -> dict[str, int]:
        """Bytes by kind where their sum is highest in a step that is not the first.

        Args:
            batch: the arguments of the model's forward, with labels.
            accumulation: forward and backward passes of a step. Two stand for more.
            max_grad_norm: gradients are clipped to it; None clips none.
        """
        with self._tracker:
            self._make_states()
            self._tracker.peak.clear()
            for _ in range(min(accumulation, 2)):
                self._model(**batch).loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._trained, max_grad_norm)
            self._optimizer.step()
        return dict(self._tracker.peak)

    def _make_states(self) -> None:
        """The optimizer's states, as they are from the second step on."""
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for states in self._optimizer.state.values():
            for state in states.values():
                self._tracker.note(state, "optimizer")

    def _make_fake(self) -> None:
        """Give the model fake tensors for those on the meta device; shared ones stay shared."""
        made: dict[torch.Tensor, torch.Tensor] = {}
        for module in self._model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        if tensor not in made:
                            made[tensor] = self._fake(tensor)
                        tensors[name] = made[tensor]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake
