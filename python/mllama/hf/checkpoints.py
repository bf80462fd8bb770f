"""transformers models and checkpoints: the part of `from_pretrained` and `save_pretrained` beyond
`mllama.checkpoints`.
"""

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, __version__

from mllama.checkpoints.files import CONFIG, listing, save_weights, write_folder, write_json
from mllama.checkpoints.loading import Report, both_ways, check_complete, check_plain, common_dtype
from mllama.checkpoints.models import fill, lay_out
from mllama.checkpoints.opened import Opened
from mllama.checkpoints.opening import GENERATION, open_checkpoint
from mllama.config.files import harmless
from mllama.device import dtype_named
from mllama.families import family_of
from mllama.hf.config_objects import check_names, config_object, file_content, set_fields
from mllama.hf.config_objects import compose as compose_object
from mllama.hf.devices import Placement
from mllama.model.offload import device_of_each
from mllama.nn.wrappers import plain_key
from mllama.quant.loading import lay_out_packed, packing
from mllama.weights import stock_names
from mllama.weights.rows import WeightMap, plan_moves, to_file

# Files of adapters saved there before, which readers of the folder would load.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def load_model(
    model_class: type[PreTrainedModel],
    folder: str | os.PathLike,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int | dict = "cpu",
    fields: dict[str, Any] | None = None,
    weights: str | None = None,
    **class_kwargs: Any,
) -> PreTrainedModel:
    """Load a transformers model from a folder or file, as `mllama.checkpoints.load`.

    Args:
        model_class: the class to build.
        folder: as `open_checkpoint` takes it.
        config: replaces the folder's.
        dtype: as `mllama.checkpoints.load`.
        device: one device; or accelerate's "auto", "balanced", "balanced_low_0", "sequential" or
            {module: device} to spread the model over devices.
        fields: config fields that override the config's values.
        weights: pack the weights, as `mllama.optimize`, one by one as they are read.
        class_kwargs: further arguments of the class's constructor.

    Raises:
        FileNotFoundError, ValueError: as `mllama.checkpoints.load`.
        TypeError: config has the wrong type, or a field is unknown.
        ImportError: several devices need accelerate, which is not installed.
    """
    if not isinstance(config, (PretrainedConfig, type(None))):
        raise TypeError(f"config must be a config object or None, got {type(config).__name__}")
    content = None if config is None else config.to_dict()
    with (opened := open_checkpoint(folder, content)).source:
        # A copy, because a model modifies its config.
        config = config_object(opened.config) if config is None else copy.deepcopy(config)
        if fields:
            set_fields(config, fields)
            opened = opened.with_config(config.to_dict())
        return load_opened(
            model_class, opened, dtype, device, config=config, weights=weights, **class_kwargs
        )[0]


def load_opened(
    model_class: type[PreTrainedModel],
    opened: Opened,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | int | dict = "cpu",
    strict: bool = True,
    config: PretrainedConfig | None = None,
    weights: str | None = None,
    mapped: bool = False,
    progress: Callable[[int, int], None] | None = None,
    gpu_layers: int | None = None,
    **class_kwargs: Any,
) -> tuple[PreTrainedModel, Report]:
    """`load_model` for an opened checkpoint; also returns the loading report.

    Args:
        strict: False loads what fits; the rest of the model stays on the meta device.
        config: the model's config. Default: the files'.
        weights: as `load_model` takes it.
        mapped, progress: as `load_weights` takes them.
        gpu_layers: as `mllama.load` takes it, with one device; the caller calls `offload` when the
            model is complete.
    """
    dtype, placement = dtype_named(dtype), Placement(device)
    config = config_object(opened.config) if config is None else config
    config.name_or_path = where = opened.source.where
    model = lay_out(opened, lambda spec: model_class(config, **class_kwargs))
    if opened.packing is not None:
        lay_out_packed(model, opened.source)
    placement.settle(model, dtype)
    device_of = placement.of
    if gpu_layers is not None:
        device_of = device_of_each(model, gpu_layers, placement.of("lm_head.weight"))
    with packing(model, weights, device, opened.packing, device_of) as take:
        report = fill(model, opened, dtype, device_of, strict, take, mapped, progress)
    model.tie_weights(recompute_mapping=False)
    model.config.dtype = dtype or report.dtype
    if opened.generation is not None and model.can_generate():
        model.generation_config = _generation_config(where, opened.generation)
    return placement.dispatch(model.eval()), report


def _generation_config(where: str, content: dict[str, Any]) -> GenerationConfig:
    content = harmless(content)
    check_names(f"{where}: {GENERATION}", GenerationConfig, content)
    try:
        generation_config = GenerationConfig.from_dict(content)
        generation_config.validate()
        # Marked as read, like in transformers: unchanged it is saved as it was, even with sampling
        # options that greedy decoding ignores.
        generation_config._original_object_hash = hash(generation_config)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: {GENERATION}: {error}") from error
    return generation_config


def save_model(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model's config, generation config and weights atomically.

    Args:
        model: the model.
        folder: created if needed. Other files in it stay.
        state_dict: replaces the model's own; it must be complete.
        max_shard_size: maximum size of a weight file in bytes, or a text such as "5GB"; larger
            weights are split into shards with an index.

    Raises:
        ValueError: the config describes another model (other shapes, or a tied head that is not
            tied); `state_dict` has missing or unknown tensors, which `load_model` would reject;
            the model has LoRA layers.
    """
    own = plain_keys(model.state_dict())
    check_plain(own)
    content, config = file_content(model.config)
    tied = plain_keys(model.get_expanded_tied_weights_keys())
    if state_dict is None:
        state_dict = own
    else:
        check_complete(state_dict.keys(), own.keys() - tied.keys(), own.keys())
    tensors = to_file(
        _weight_map(config),
        {name: tensor for name, tensor in state_dict.items() if name not in tied},
    )
    content |= versions(model, tensors)
    content.pop("dtype", None)
    check_readable(model, content, state_dict)
    write_model(model, folder, content, lambda aside: save_weights(aside, tensors, max_shard_size))


def versions(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Fields of config.json that say which release wrote a model's tensors, and their dtype."""
    dtype = str(common_dtype(tensors, model.dtype)).removeprefix("torch.")
    return {"transformers_version": __version__, "torch_dtype": dtype}


def write_model(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    content: dict[str, Any],
    save: Callable[[Path], None],
) -> None:
    """Write a model's folder atomically: `content` as config.json, the generation config, and the
    weights, which `save` writes.
    """

    def write(aside: Path) -> None:
        write_json(aside / CONFIG, content)
        if model.can_generate():
            model.generation_config.save_pretrained(aside)
        save(aside)

    write_folder(Path(folder), write, replaced=ADAPTER_FILES)


def _weight_map(config: PretrainedConfig) -> WeightMap:
    return family_of({"model_type": config.model_type}).weight_map(compose_object(config))


def own_names(config: PretrainedConfig, names: Iterable[str]) -> dict[str, str]:
    """`mllama.weights.stock_names.own_names` of a config."""
    return stock_names.own_names(_weight_map(config), names)


def check_readable(
    model: PreTrainedModel, content: dict[str, Any], state_dict: dict[str, torch.Tensor]
) -> None:
    """Reject writing a folder that would be read as another model.

    Args:
        model: the model to write.
        content: the content of its config.json.
        state_dict: the tensors to write, by the model's names.

    Raises:
        ValueError: tensors have other shapes than the config's model, or a tensor that the config
            ties has its own values; the message names them.
    """
    kind = next(
        kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] == "mllama"
    )
    with torch.device("meta"):
        reader = kind(config_object(family_of(content).from_json(content)))
    tied = reader.get_expanded_tied_weights_keys()
    read = {name: tensor.shape for name, tensor in reader.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state_dict.items() if name not in tied}
    unlike = [
        f"{name}: {list(given.get(name, ())) or 'nothing'} for "
        f"{list(read.get(name, ())) or 'nothing'}"
        for name in sorted(given.keys() | (read.keys() - tied.keys()))
        if given.get(name) != read.get(name)
    ]
    if unlike:
        raise ValueError(
            "the config does not describe this model, so the folder could not be read: "
            f"{listing(unlike)}"
        )
    for name, other in tied.items():
        if name in state_dict and not _same(state_dict[name], state_dict[other]):
            raise ValueError(
                f"tie_word_embeddings is True, but {name} has its own values, which would be "
                "lost: set it to False, or tie_weights()"
            )


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor is other or tensor.is_meta or other.is_meta:
        return True
    return tensor.shape == other.shape and bool((tensor == other.to(tensor.device)).all())


def plain_keys(named: dict[str, Any]) -> dict[str, Any]:
    """Remove the parts of names that wrappers of layers add."""
    return {plain_key(name): value for name, value in named.items()}


def translate_state_dict(
    model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Translate a state dict's names from the files' to the model's; tied tensors get both names.

    Unknown names stay, for `load_state_dict` to report. Wrappers' parts of names are removed.

    Args:
        model: the model whose names are wanted.
        state_dict: tensors under either's names.
    """
    own = plain_keys(model.state_dict()).keys()
    moves, unknown, _ = plan_moves(
        _weight_map(model.config), [name for name in state_dict if name not in own]
    )
    translated = {
        name: tensor for name, tensor in state_dict.items() if name in own or name in unknown
    }
    for move in moves:
        given = {name: state_dict[name] for name in move.theirs if name is not None}
        whole = len(given) == len(move.theirs)
        translated |= (
            zip(move.ours, move.row.read(list(given.values())), strict=True) if whole else given
        )
    tied = both_ways(
        {
            name: plain_key(other)
            for name, other in plain_keys(model.get_expanded_tied_weights_keys()).items()
        }
    )
    return {
        name: translated[other] for name, other in tied.items() if other in translated
    } | translated
