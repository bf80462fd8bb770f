"""Model folders: which format one has, and reading and writing it. A folder's `model_type` decides, exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, __version__

from mllama.checkpoints import engine, siglip_llama
from mllama.config import MllamaConfig, check_names

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Format:
    """One kind of model folder.

    Attributes:
        table: between the files' tensor names and the model's.
        to_file: MllamaConfig -> the content of config.json.
        from_file: the content of config.json -> the arguments of MllamaConfig.
    """

    table: engine.Table
    to_file: Callable[[MllamaConfig], dict[str, Any]]
    from_file: Callable[[dict[str, Any]], dict[str, Any]]


FORMATS = {
    "llava": Format(siglip_llama.TABLE, siglip_llama.llava_to_file, siglip_llama.llava_from_file),
    MllamaConfig.model_type: Format(siglip_llama.TABLE, siglip_llama.own_to_file, dict),
}


def format_of(config: MllamaConfig) -> Format:
    """The format a model of this config is written in: Hugging Face's own where there is one."""
    return FORMATS["llava" if siglip_llama.is_llava(config) else config.model_type]


def config_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `MllamaConfig` from the content of a config.json of any known format.

    Fields that could steer what code runs are left out.

    Raises:
        ValueError: an unknown `model_type`, a sub-config that is no object, a name that is no field's.
    """
    for name in ("vision_config", "text_config"):
        if not isinstance(content.get(name, {}), (dict, type(None))):
            raise ValueError(f"config.json: {name} must be an object, got {content[name]!r}")
    check_names("config.json", MllamaConfig, {name: value for name, value in _harmless(content).items() if name != "model_type"})
    return _format_named(content).from_file(_harmless(content))


def _format_named(content: dict[str, Any]) -> Format:
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(f"config.json: model_type {kind!r} is not known; known are {', '.join(sorted(FORMATS))}")
    return FORMATS[kind]


def _harmless(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    steering = ("auto_map", "trust_remote_code", "attn_implementation", "experts_implementation")
    return {name: _harmless(value) for name, value in content.items() if not name.startswith("_") and name not in steering}


def load_model(
    model_class: type[PreTrainedModel],
    folder: str | Path,
    config: MllamaConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Build a model from a folder, in eval mode. The model is laid out on the meta device first, so memory holds its weights once.

    Args:
        model_class: what to build.
        folder: with config.json and safetensors weights. Their headers are read first: they bound what is built.
        config: takes the place of the folder's.
        dtype: "auto" is the files' own (the one most of their elements have); or float32, bfloat16, float16.
        device: where the weights go.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights.
        ValueError: an unknown model_type, a broken file, a config that cannot be, weights that do not fit (every name in one error), a
            dtype or device that is none.
        TypeError: a config of another kind.
    """
    if config is not None and not isinstance(config, MllamaConfig):
        raise TypeError(f"config must be a MllamaConfig or None, got {type(config).__name__}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {str(folder)!r}")
    if not (folder / engine.CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {engine.CONFIG}")
    dtype, device = _dtype(dtype), _device(device)
    content = engine.read_json(folder / engine.CONFIG)
    table = _format_named(content).table
    if config is None:
        try:
            config = MllamaConfig(**config_arguments(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / engine.CONFIG}: {error}") from error
    files = engine.find_weights(folder)
    _check_layers(folder, config, len(files))
    config.name_or_path = str(folder)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except (RuntimeError, OverflowError) as error:  # of sizes that are each in range, whose product is not
        raise ValueError(f"{folder / engine.CONFIG}: no model of these sizes can be laid out: {error}") from error
    tied = model.get_expanded_tied_weights_keys()
    engine.load_weights(model, folder, table, dtype, device, optional=tied, files=files)
    model.tie_weights()
    config.dtype = model.dtype
    if (folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(folder / "generation_config.json")
    return model.eval()


def _check_layers(folder: Path, config: MllamaConfig, tensors: int) -> None:
    """Before layers are built: every one needs tensors of its own, so the files bound their number."""
    for name, part in (("vision_config", config.vision_config), ("text_config", config.text_config)):
        if part.num_hidden_layers > tensors:
            raise ValueError(f"{folder}: {name}: num_hidden_layers is {part.num_hidden_layers}, the weights hold {tensors} tensors in all")


def _generation_config(path: Path) -> GenerationConfig:
    content = _harmless(engine.read_json(path))
    check_names(str(path), GenerationConfig, content)
    try:
        generation_config = GenerationConfig.from_dict(content)
        generation_config.validate()
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return generation_config


def save_model(
    model: PreTrainedModel, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None, max_shard_size: int | str = "5GB"
) -> None:
    """Write a model's config, generation config and weights, whole or not at all.

    Args:
        model: what to write.
        folder: made if absent. Other files in it stay.
        state_dict: takes the place of the model's own; it must have all of its names.
        max_shard_size: bytes of one weight file, or text as "5GB"; more is written as shards and an index.

    Raises:
        ValueError: `state_dict` lacks a tensor of the model or has one it does not know: `load_model` would refuse the folder.
    """
    form = format_of(model.config)
    tied = model.get_expanded_tied_weights_keys()
    if state_dict is None:
        state_dict = model.state_dict()
    else:
        engine.check_complete(state_dict.keys(), model.state_dict().keys() - tied.keys(), model.state_dict().keys())
    tensors = {engine.file_name(form.table, name): tensor for name, tensor in state_dict.items() if name not in tied}
    dtype = str(engine.common_dtype(tensors, model.dtype)).removeprefix("torch.")
    content = form.to_file(model.config) | {"transformers_version": __version__, "torch_dtype": dtype}
    content.pop("dtype", None)

    def write(aside: Path) -> None:
        engine.write_json(aside / engine.CONFIG, content)
        model.generation_config.save_pretrained(aside)
        engine.save_weights(aside, tensors, max_shard_size)

    engine.write_folder(Path(folder), write)


def translate_state_dict(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the files' names brought to the model's, tied tensors in both their places.

    A name that neither knows stays, for `load_state_dict` to report.
    """
    table, own = format_of(model.config).table, model.state_dict().keys()
    names = {name: name if name in own else engine.our_name(table, name) for name in state_dict}
    translated = {name if ours is None else ours: state_dict[name] for name, ours in names.items() if ours != ""}
    tied = model.get_expanded_tied_weights_keys()
    return {name: translated[other] for name, other in tied.items() if other in translated} | translated


def _dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """None for "auto"."""
    if dtype in ("auto", None):
        return None
    known = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if known not in _DTYPES.values():
        raise ValueError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))} or one of these torch dtypes, got {dtype!r}")
    return known


def _device(device: torch.device | str) -> torch.device:
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{device!r} is not a device: {error}") from error
    if known.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but this torch sees no CUDA device")
    return known
