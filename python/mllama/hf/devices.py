"""Placement of a model's weights: one device, or several with accelerate."""

from typing import Any

import torch
from transformers import PreTrainedModel

_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


class Placement:
    """The device of every tensor of a model.

    Raises:
        ValueError: a device is invalid or not available, or is a disk.
        ImportError: several devices need accelerate, which is not installed.
    """

    def __init__(self, device: torch.device | str | int | dict[str, Any]):
        """
        Args:
            device: one device; or "auto", "balanced", "balanced_low_0" or "sequential", which
                accelerate turns into a map of modules to devices; or such a map.
        """
        if isinstance(device, dict) and list(device) == [""]:
            device = device[""]
        if device in _PLANS and not torch.cuda.is_available():
            device = "cpu"
        self._plan = device if device in _PLANS else None
        self._map: dict[str, torch.device] = {}
        if isinstance(device, dict):
            self._map = {name: _device(place) for name, place in device.items()}
        elif self._plan is None:
            self._map = {"": _device(device)}
        self._spread = len(self._map) != 1
        if self._spread:
            try:
                import accelerate  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    f"device_map={device!r} spreads a model over devices, which needs accelerate: "
                    "install it"
                ) from error

    def settle(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        """Choose a device for every tensor of a model, which may be on the meta device.

        Raises:
            ValueError: the map leaves out a tensor or names an unknown module, or memory is too
                small.
        """
        if self._plan is not None:
            self._map = {
                name: _device(place) for name, place in _infer(model, self._plan, dtype).items()
            }
        modules = dict(model.named_modules())
        if unknown := [name for name in self._map if name not in modules]:
            raise ValueError(f"device_map names {', '.join(unknown)}, which the model lacks")
        if absent := [name for name in model.state_dict() if self._find(name) is None]:
            raise ValueError(
                f"device_map has no device for {', '.join(absent[:5])}"
                f"{' ...' if len(absent) > 5 else ''}"
            )

    def _find(self, name: str) -> torch.device | None:
        while name and name not in self._map:
            name = name.rpartition(".")[0]
        return self._map.get(name)

    def of(self, name: str) -> torch.device:
        """The device of a tensor by name, after `settle`."""
        return self._find(name)

    def dispatch(self, model: PreTrainedModel) -> PreTrainedModel:
        """Let accelerate move activations between devices, if there are several."""
        if not self._spread:
            return model
        from accelerate import dispatch_model

        places = {
            name: place.index if place.type == "cuda" else place.type
            for name, place in self._map.items()
        }
        return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def _infer(model: PreTrainedModel, how: str, dtype: torch.dtype | None) -> dict[str, Any]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    model.tie_weights(recompute_mapping=False)
    options = {"dtype": dtype, "no_split_module_classes": model._no_split_modules}
    memory = (
        None
        if how == "sequential"
        else get_balanced_memory(model, low_zero=how == "balanced_low_0", **options)
    )
    return infer_auto_device_map(model, max_memory=memory, **options)


def _device(device: torch.device | str | int) -> torch.device:
    if device == "disk":
        raise ValueError(
            "device_map places a part on disk, which is not supported; the model has to fit "
            "into memory"
        )
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device: {error}") from error
    if known.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but this torch sees no CUDA device")
        if known.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    try:
        torch.empty(0, device=known)
    except (
        RuntimeError,
        AssertionError,
        ImportError,
        NotImplementedError,
    ) as error:  # each backend raises its own type if unavailable
        raise ValueError(
            f"device {device!r} was asked for, but this torch cannot use it: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return known
