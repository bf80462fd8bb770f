"""Selection of the image encoder's states."""

from typing import NamedTuple

from mllama.config.parts import select_features
from mllama.config.spec import ModelSpec


class FeatureChoice(NamedTuple):
    """The states of the encoder that one call reads.

    Attributes:
        layers: indices of states, as `ModelSpec.feature_layers`.
        skip_first: leave out the first feature of each image.
        interpolate: accept pixels of any size.
        explicit: the call made the choice, so image_features encoded earlier are rejected.
    """

    layers: tuple[int, ...] | None = None
    skip_first: bool = False
    interpolate: bool = False
    explicit: bool = False


def choose_features(
    spec: ModelSpec,
    layer: int | list[int] | None = None,
    strategy: str | None = None,
    interpolate: bool | None = None,
) -> FeatureChoice:
    """Resolve a call's arguments, with the spec as default.

    Args:
        spec: spec of a model with images.
        layer: `vision_feature_layer`.
        strategy: `vision_feature_select_strategy`.
        interpolate: `interpolate_pos_encoding`.

    Raises:
        ValueError: a layer does not exist, the strategy is unknown, or the number of layers does
            not fit the projector.
    """
    layers, skip = spec.feature_layers, spec.skip_first
    if layer is not None or strategy is not None:
        layers, skip = select_features(
            spec.feature_layers if layer is None else layer,  # type: ignore[arg-type]
            ("default" if skip else "full") if strategy is None else strategy,
            spec.vision.num_hidden_layers + 1,
        )
    if layers is not None and len(layers) * spec.vision.hidden_size != spec.projector_sizes[0]:
        wanted = spec.projector_sizes[0] // spec.vision.hidden_size
        raise ValueError(
            f"vision_feature_layer must name {wanted} states, which fit the projector's width; "
            f"got {layer!r}"
        )
    explicit = layer is not None or strategy is not None or bool(interpolate)
    return FeatureChoice(layers, skip, bool(interpolate), explicit)
