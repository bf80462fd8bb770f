"""Models that are packed while they are loaded, and those whose files are packed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from mllama.nn.packed import FORMAT, PackedEmbedding, PackedFormat, PackedLinear, packed_layer
from mllama.quant.packer import (
    AUTO,
    EMBEDDINGS,
    FILE,
    HEAD,
    RECIPES,
    Packer,
    check_packable,
    check_tied,
    is_tied,
    mark_packed,
    tie_packed,
)


class _Source(Protocol):
    """What is read of `mllama.checkpoints.sources.Source`."""

    where: str

    def headers(self) -> dict[str, Any]: ...

    def read(self, name: str) -> torch.Tensor: ...


@contextmanager
def packing(
    model: nn.Module,
    weights: str | None,
    device: Any,
    packed_as: str | None = None,
    device_of: Callable[[str], Any] | None = None,
) -> Iterator[Callable[..., bool] | None]:
    """Context in which a model is loaded: yields what takes its tensors, None where none is packed.

    Args:
        model, weights, device, device_of: as `Packer` takes them.
        packed_as: how the files' weights are packed already; then `lay_out_packed` has prepared
            the model, and weights is None, FILE, AUTO or the same.

    Raises:
        ValueError: as `Packer`; the files' weights are packed otherwise.
    """
    packer: Packer | _Mapped
    if packed_as is not None:
        if weights not in (None, FILE, AUTO, packed_as):
            raise ValueError(
                f"weights must be {packed_as!r}, as the files' weights are packed, got {weights!r}"
            )
        packer = _Mapped(model, packed_as, device, device_of)
    elif weights is None:
        yield None
        return
    else:
        packer = Packer(model, weights, device, device_of)
    yield packer.take
    packer.finish()


def lay_out_packed(model: nn.Module, source: _Source) -> None:
    """Replace layers of a model on the meta device by packed ones, also there, as the formats in
    packed files say.

    Raises:
        ValueError: a format is not known, or has another shape than the model's layer.
    """
    modules = dict(model.named_modules())
    tied = is_tied(model)
    for name in source.headers():
        owner, _, last = name.rpartition(".")
        module = modules.get(owner)
        if last != FORMAT or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue  # an unknown name is reported with all others
        if tied and owner == HEAD:
            continue  # it gets the embeddings' format
        try:
            found = PackedFormat.from_tensor(source.read(name))
        except ValueError as error:
            raise ValueError(f"{source.where}: {name}: {error}") from error
        if tuple(module.weight.shape) != found[1:]:
            raise ValueError(
                f"{source.where}: {name} is {found}, the model takes {list(module.weight.shape)}"
            )
        _put(model, owner, found)
        if tied and owner == EMBEDDINGS:
            _put(model, HEAD, found)


def _put(model: nn.Module, name: str, found: PackedFormat) -> None:
    packed = torch.empty(found.nbytes, dtype=torch.uint8, device="meta")
    module: Any = model.get_submodule(name)
    model.set_submodule(name, packed_layer(module, packed, found.packing, torch.float32))


class _Mapped:
    """Takes packed files' weights as they are: views of the mapped files, which processes share, or
    copies on another device than the CPU.

    Args:
        model: as `lay_out_packed` left it.
        weights, device, device_of: as `Packer` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str,
        device: Any,
        device_of: Callable[[str], Any] | None = None,
    ):
        check_packable(model, weights, device)
        kinds = PackedLinear, PackedEmbedding
        found = {one.packing for one in model.modules() if isinstance(one, kinds)}
        recipe = RECIPES.get(weights)
        named = set(weights.split("+")) if recipe is None else set(vars(recipe).values())
        if not found <= named:
            raise ValueError(
                f"the config says that weights are packed as {weights!r}, the files have "
                f"{', '.join(sorted(found))}"
            )
        self.model, self.weights = model, weights
        self._device_of = device_of or (lambda name: device)

    def take(
        self, name: str, read: Callable[..., torch.Tensor], header: Any, dtype: torch.dtype
    ) -> bool:
        """As `Packer.take`."""
        owner, _, last = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if not isinstance(module, (PackedLinear, PackedEmbedding)) or last == "bias":
            return False
        if owner == HEAD and is_tied(self.model):
            check_tied(torch.equal(read(), module.state_dict()[last].cpu()))
            return True
        if last == FORMAT:  # lay_out_packed has read it
            return True
        module.packed = read().to(self._device_of(owner))
        if isinstance(module, PackedEmbedding):
            module.set_dtype(dtype)
            tie_packed(self.model)
        return True

    def finish(self) -> None:
        """As `Packer.finish`."""
        mark_packed(self.model, self.weights)
