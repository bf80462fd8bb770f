"""An opened model folder or file: headers are known, tensors are not read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from mllama.checkpoints.sources import Source
from mllama.config.spec import ModelSpec
from mllama.device import choose_device, choose_dtype
from mllama.families import family_of
from mllama.ops._dispatch import has_kernel
from mllama.weights.family import Config, Family
from mllama.weights.rows import WeightMap


@dataclass(frozen=True)
class Opened:
    """An opened model folder or file.

    Attributes:
        family: the model's family.
        config: complete, as `Family.from_json` returns it.
        spec: the model's spec.
        source: the tensors; whoever opened it closes it.
        map_of: spec -> the rows between the source's tensors and the model's.
        generation: arguments of a GenerationConfig; None if the files have none.
        packing: how the files' weights are packed, as their config names it; None where they have
            plain tensors.
        changed: whether the weight files changed since they were opened.
    """

    family: Family
    config: Config
    spec: ModelSpec
    source: Source
    map_of: Callable[[ModelSpec], WeightMap]
    generation: dict[str, Any] | None = None
    packing: str | None = None
    changed: Callable[[], bool] = lambda: False

    @classmethod
    def of(
        cls,
        config: Config,
        source: Source,
        map_of: Callable[[ModelSpec], WeightMap] | None = None,
        generation: dict[str, Any] | None = None,
    ) -> "Opened":
        """Build from a config's content. Raises ValueError for an invalid config."""
        family = family_of(config)
        config = family.from_json(config)
        spec = family.read(config)
        return cls(family, config, spec, source, map_of or family.weight_map, generation)

    @property
    def weight_map(self) -> WeightMap:
        """The rows between the source's tensors and the model's."""
        return self.map_of(self.spec)

    def choose_device(self, device: torch.device | str) -> torch.device:
        """`mllama.device.choose_device`; "auto" of packed weights is the CPU where this build has
        no other kernels for them.
        """
        found = choose_device(device)
        stays = device == "auto" and self.packing is not None
        return torch.device("cpu") if stays and not has_kernel("packed_linear", found) else found

    def resolve_dtype(self, dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
        """Resolve "auto" for a device; any other dtype is returned unchanged."""
        if not isinstance(dtype, str) or dtype != "auto":
            return dtype
        headers = self.source.headers().values()
        sizes = (torch.Size(one.shape).numel() * one.dtype.itemsize for one in headers)
        return choose_dtype(device, sum(sizes))

    def with_config(self, config: Config) -> "Opened":
        """The same files with a changed config. Raises ValueError for an invalid one."""
        return replace(self, config=config, spec=self.family.compose(config))


def check_config(config: Config, family: Family) -> None:
    """Reject a config of another family in place of the files' own.

    Raises:
        TypeError: the config is another family's.
    """
    own = family_of(config)
    if family.name not in (own.name, own.written_as(own.from_json(config))["model_type"]):
        raise TypeError(f"config must be a {family.name} config or None, got a {own.name} config")
