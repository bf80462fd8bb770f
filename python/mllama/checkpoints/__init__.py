"""Model folders and files: which format one has, and reading and writing it. A folder's `model_type` decides, exactly."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, __version__

from mllama.checkpoints import gemma, llama, mllama, paligemma, siglip, siglip_llama
from mllama.checkpoints.engine import plan, to_file
from mllama.checkpoints.files import CONFIG, find_gguf, find_inside, read_json, save_weights, write_folder, write_json
from mllama.checkpoints.formats import Format, Opened
from mllama.checkpoints.loading import check_complete, common_dtype, load_weights
from mllama.checkpoints.meta import PARAMS, open_meta
from mllama.checkpoints.sources import open_safetensors
from mllama.config import MllamaConfig, check_names

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GENERATION = "generation_config.json"

FORMATS = {
    "gemma": gemma.FORMAT,
    "llama": llama.FORMAT,
    "llava": siglip_llama.LLAVA,
    "mllama": mllama.FORMAT,
    "paligemma": paligemma.FORMAT,
    "siglip": siglip.WHOLE,
    "siglip_llama": siglip_llama.FORMAT,
    "siglip_vision_model": siglip.FORMAT,
}


def format_of(config: PretrainedConfig) -> Format:
    """The format a model of this config is written in: Hugging Face's own where there is one."""
    return FORMATS["llava" if siglip_llama.is_llava(config) else config.model_type]


def config_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `MllamaConfig` from the content of a config.json of LLaVA's or our own format.

    Fields that could steer what code runs are left out.

    Raises:
        ValueError: an unknown `model_type`, a sub-config that is no object, a name that is no field's.
    """
    content = _checked(content, MllamaConfig)
    _format_named(content)
    return siglip_llama.llava_from_file(content) if content["model_type"] == "llava" else content


def _checked(content: dict[str, Any], config_class: type[PretrainedConfig]) -> dict[str, Any]:
    for name in ("vision_config", "text_config"):
        if not isinstance(content.get(name, {}), (dict, type(None))):
            raise ValueError(f"config.json: {name} must be an object, got {content[name]!r}")
    content = _harmless(content)
    check_names("config.json", config_class, {name: value for name, value in content.items() if name != "model_type"})
    return content


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
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    **class_kwargs: Any,
) -> PreTrainedModel:
    """Build a model from a folder, in eval mode. The model is laid out on the meta device first, so memory holds its weights once.

    Args:
        model_class: what to build.
        folder: with config.json and safetensors weights. Their headers are read first: they bound what is built.
        config: takes the place of the folder's.
        dtype: "auto" is the files' own (the one most of their elements have); or float32, bfloat16, float16.
        device: where the weights go.
        class_kwargs: further arguments of the class's constructor.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights.
        ValueError: an unknown model_type, a broken file, a config that cannot be, weights that do not fit (every name in one error), a
            dtype or device that is none.
        TypeError: a config of another kind.
    """
    dtype, device = _dtype(dtype), _device(device)
    with (opened := open_checkpoint(folder, config)).source:
        config = opened.config
        config.name_or_path = str(folder)
        try:
            with torch.device("meta"):
                model = model_class(config, **class_kwargs)
        except (RuntimeError, OverflowError) as error:  # of sizes that are each in range, whose product is not
            raise ValueError(f"{folder}: no model of these sizes can be laid out: {error}") from error
        load_weights(model, opened.source, opened.table, dtype, lambda name: device, model.get_expanded_tied_weights_keys())
    model.tie_weights()
    config.dtype = model.dtype
    if opened.generation is not None:
        model.generation_config = _generation_config(str(folder), opened.generation)
    return model.eval()


def open_checkpoint(path: str | Path, config: PretrainedConfig | None = None) -> Opened:
    """Find out what a path holds, and open it: a Hugging Face folder. Headers are read and no tensor.

    Args:
        path: the folder.
        config: takes the place of the folder's.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights.
        ValueError: an unknown model_type, a broken file, a config that cannot be.
        TypeError: a config of another kind.
    """
    folder = Path(path)
    if (file := find_gguf(folder)) is not None:
        from mllama.checkpoints.gguf import open_gguf  # here, since its library is an optional dependency

        return open_gguf(file, config)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {str(folder)!r}")
    if (folder / PARAMS).exists() and not (folder / CONFIG).exists():
        return open_meta(folder)
    content = read_json(find_inside(folder, CONFIG))
    form = _format_named(content)
    if config is None:
        try:
            config = form.from_file(_checked(content, form.config_class))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
    elif not isinstance(config, form.config_class):
        raise TypeError(f"config must be a {form.config_class.__name__} or None, got {type(config).__name__}")
    generation = read_json(find_inside(folder, _GENERATION)) if (folder / _GENERATION).exists() else None
    source = open_safetensors(folder)
    _check_layers(folder, config, len(source.headers()))
    return Opened(config, form.table(config), source, generation)


def _check_layers(folder: Path, config: MllamaConfig, tensors: int) -> None:
    """Before layers are built: every one needs tensors of its own, so the files bound their number."""
    for name, part in (("vision_config", config.vision_config), ("text_config", config.text_config)):
        if part.num_hidden_layers > tensors:
            raise ValueError(f"{folder}: {name}: num_hidden_layers is {part.num_hidden_layers}, the weights hold {tensors} tensors in all")


def _generation_config(where: str, content: dict[str, Any]) -> GenerationConfig:
    content = _harmless(content)
    check_names(f"{where}: {_GENERATION}", GenerationConfig, content)
    try:
        generation_config = GenerationConfig.from_dict(content)
        generation_config.validate()
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"{where}: {_GENERATION}: {error}") from error
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
        check_complete(state_dict.keys(), model.state_dict().keys() - tied.keys(), model.state_dict().keys())
    tensors = to_file(form.table(model.config), {name: tensor for name, tensor in state_dict.items() if name not in tied})
    dtype = str(common_dtype(tensors, model.dtype)).removeprefix("torch.")
    content = form.to_file(model.config) | {"transformers_version": __version__, "torch_dtype": dtype}
    content.pop("dtype", None)

    def write(aside: Path) -> None:
        write_json(aside / CONFIG, content)
        model.generation_config.save_pretrained(aside)
        save_weights(aside, tensors, max_shard_size)

    write_folder(Path(folder), write)


def translate_state_dict(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the files' names brought to the model's, tied tensors in both their places.

    A name that neither knows stays, for `load_state_dict` to report.
    """
    own = model.state_dict().keys()
    moves, unknown, _ = plan(format_of(model.config).table(model.config), [name for name in state_dict if name not in own])
    translated = {name: tensor for name, tensor in state_dict.items() if name in own or name in unknown}
    for move in moves:
        given = {name: state_dict[name] for name in move.theirs if name is not None}
        whole = len(given) == len(move.theirs)
        translated |= zip(move.ours, move.row.read(list(given.values())), strict=True) if whole else given
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
