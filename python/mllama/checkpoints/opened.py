"""An opened model folder or file: its headers known, no tensor read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mllama.checkpoints.sources import Source
from mllama.config.spec import ModelSpec
from mllama.families import family_of
from mllama.weights.family import Config, Family
from mllama.weights.rows import WeightMap


@dataclass(frozen=True)
class Opened:
    """A model folder or file.

    Attributes:
        family: of the model.
        config: complete, as `Family.from_json` gives it.
        spec: what the model is built from.
        source: of the tensors; who opened it closes it.
        map_of: spec -> the rows between the source's tensors and the model's.
        generation: the arguments of a GenerationConfig, None where the files say nothing.
        changed: whether the weights' files are others now than when they were opened.
    """

    family: Family
    config: Config
    spec: ModelSpec
    source: Source
    map_of: Callable[[ModelSpec], WeightMap]
    generation: dict[str, Any] | None = None
    changed: Callable[[], bool] = lambda: False

    @classmethod
    def of(
        cls,
        config: Config,
        source: Source,
        map_of: Callable[[ModelSpec], WeightMap] | None = None,
        generation: dict[str, Any] | None = None,
    ) -> "Opened":
        """Of a config's content. Raises ValueError for a config that cannot be."""
        family = family_of(config)
        config = family.from_json(config)
        spec = family.read(config)
        return cls(family, config, spec, source, map_of or family.weight_map, generation)

    @property
    def weight_map(self) -> WeightMap:
        """The rows between the source's tensors and the model's."""
        return self.map_of(self.spec)

    def with_config(self, config: Config) -> "Opened":
        """The same files under a config with other fields. Raises ValueError for one that cannot
        be.
        """
        return replace(self, config=config, spec=self.family.compose(config))


def check_config(config: Config, family: Family) -> None:
    """Refuse a config in the place of the files' own that is of another family.

    Raises:
        TypeError: it is.
    """
    own = family_of(config)
    if family.name not in (own.name, own.written_as(own.from_json(config))["model_type"]):
        raise TypeError(f"config must be of a {family.name} or None, got that of a {own.name}")
