"""A training step without memory: parameters and activations have shapes and no values."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mllama.plan.allocations import AllocationTracker
from mllama.plan.workspaces import TILE_ELEMENTS, workspace
from mllama.runtime.images import IMAGE_INPUTS
from mllama.train.batches import Batch, count_trained
from mllama.train.prepare import autocast

TRAINED, FROZEN = "trained parameters", "frozen weights"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"


class FakeSteps:
    """Optimizer steps of a model on the meta device, computed with fake tensors to count bytes.

    Batches are real, since their ids and masks decide what is computed; what depends on parameters
    has shapes alone. All that torch allocates is counted, by the very code that trains; what
    libraries take for themselves inside of an operator is not.

    Args:
        model: a model on the meta device; its parameters become fake, and it is set to training
            mode.
        dtype: of the computation, under autocast unless it is float32.
        make_optimizer: makes the optimizer of the trained parameters, given by name.
        device: the type of the device that is stood for.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        make_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
        device: str = "cpu",
    ):
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model, self._dtype = model.train(), dtype
        self._make_fake()
        tile = partial(workspace, elements=TILE_ELEMENTS.get(device, TILE_ELEMENTS["cpu"]))
        self._tracker = AllocationTracker(model.spec.text.vocab_size, tile)
        for tensor in (*model.parameters(), *model.buffers()):
            self._tracker.note(tensor, TRAINED if tensor.requires_grad else FROZEN)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        for parameter in trained.values():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: self._tracker.note(parameter.grad, GRADIENTS)
            )
        self._trained = list(trained.values())
        self._optimizer = make_optimizer(trained)

    def peak(
        self, batch: Batch, accumulation: int, max_grad_norm: float | None, cached: bool = False
    ) -> dict[str, int]:
        """Bytes by kind at the moment of a step, not the first, when their sum is highest.

        Args:
            batch: the arguments of the model's forward, with labels.
            accumulation: forward and backward passes of a step. Two stand for more.
            max_grad_norm: gradients are clipped to it; None clips none.
            cached: images come as features, as from `FeatureCache`.
        """
        if cached:
            batch = self._with_features(batch)
        with ExitStack() as stack:
            stack.enter_context(self._tracker)
            stack.enter_context(_WithoutValues())
            self._make_states()
            self._tracker.peak.clear()
            for _ in range(min(accumulation, 2)):
                self._forward(batch).loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._trained, max_grad_norm)
            self._optimizer.step()
        return {kind: size for kind, size in self._tracker.peak.items() if size}

    def _forward(self, batch: Batch) -> Any:
        """As the training loop does."""
        trained = count_trained(batch)
        with autocast("cpu", self._dtype):
            return self._model(**batch, logits_to_keep=None, num_items_in_batch=trained)

    @torch.no_grad()
    def _with_features(self, batch: Batch) -> Batch:
        if "pixel_values" not in batch:
            return batch
        images = {name: batch[name] for name in IMAGE_INPUTS if name in batch}
        with _WithoutValues():
            features = self._model.get_image_features(**images)
        rest = {name: value for name, value in batch.items() if name != "pixel_values"}
        return rest | {"image_features": features}

    def _make_states(self) -> None:
        """The optimizer's states, as they are from the second step on."""
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for states in self._optimizer.state.values():
            for state in states.values():
                self._tracker.note(state, OPTIMIZER)

    def _make_fake(self) -> None:
        """Give the model fake tensors; those that are shared stay shared. Buffers that are not on
        the meta device, such as frequencies, keep their values.
        """
        made: dict[torch.Tensor, torch.Tensor] = {}
        for module in self._model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or not (tensor.is_meta or isinstance(tensor, nn.Parameter)):
                        continue
                    if tensor not in made:
                        made[tensor] = self._fake(tensor)
                    tensors[name] = made[tensor]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake


class _WithoutValues(TorchDispatchMode):
    """Answers what fake tensors cannot: a question about a value that is not there with no, so that
    nothing is saved for being equal; and a real mask that selects from one by its true places.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0
        if func is torch.ops.aten.index.Tensor and isinstance(args[0], FakeTensor):
            args = (args[0], [place for index in args[1] for place in _places(index)])
        return func(*args, **(kwargs or {}))


def _places(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A mask's true places in each of its dimensions; other indices as they are."""
    is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if is_mask else (index,)  # type: ignore[union-attr]
