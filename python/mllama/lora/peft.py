"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, with keys
`base_model.model.NAME.lora_A.weight`.
"""

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllama.checkpoints.files import (
    WEIGHTS,
    find_inside,
    listing,
    read_json,
    save_tensors,
    write_folder,
    write_json,
)
from mllama.lora.adapter import Options, check_adapter
from mllama.lora.layer import Linear_LORA

CONFIG, ADAPTERS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# the wrapper that PEFT puts around a layer
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.[^.]+$)")
# PEFT also writes their frozen weights if they were resized or have adapters
_EMBEDDINGS = ("embed_tokens", "lm_head")
_KEY = re.compile(
    r"(?P<name>.+)\.lora_((?P<part>[AB])(\.default)?\.weight|magnitude_vector(\.default)?(\.weight)?)"
)

# _READ: fields that define the layers, all honored. _DESCRIPTIVE: fields that do not change what a
# trained adapter computes.
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "use_rslora",
    "target_modules",
    "modules_to_save",
}
_DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# Those with numbers, and what they are a number of; with `_pattern`, by regular expressions.
_NUMBERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rank_pattern": "rank",
    "alpha_pattern": "alpha",
}
# Allowed values of these fields; any other field must be off (false, null or empty). Other
# initializations change the frozen weights too.
_ONLY = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def is_peft(keys: Iterable[str]) -> bool:
    """Whether tensors have PEFT's names."""
    return any(key.startswith("base_model.") for key in keys)


def own_key(name: str) -> str:
    """NAME.lora_A.weight -> NAME.lora_a.weight, NAME.lora_magnitude_vector ->
    NAME.lora_magnitude.weight; other names stay.
    """
    if not (found := _KEY.fullmatch(name)):
        return name
    return f"{found['name']}.lora_{(found['part'] or 'magnitude').lower()}.weight"


def weights_file(folder: Path) -> Path:
    """The tensor file of an adapter folder.

    Raises:
        FileNotFoundError: there is none.
    """
    pickled = (folder / PICKLE).exists() and not (folder / ADAPTERS).exists()
    return find_inside(folder, PICKLE if pickled else ADAPTERS)


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json and reject unsupported fields.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a field has an unsupported value; the message names it.
    """
    path = find_inside(folder, CONFIG)
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for name, value in config.items():
        allowed = _ONLY.get(name)
        if (
            name in _READ
            or name in _DESCRIPTIVE
            or (allowed is None and not value)
            or (allowed and value in allowed)
        ):
            continue
        taken = ", ".join(map(repr, allowed)) if allowed else "off"
        raise ValueError(
            f"{path}: {name} must be {taken}, got {value!r}: such adapters are not supported"
        )
    for name in _READ & config.keys():
        try:
            _check_field(name, config[name])
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return config


def _check_field(name: str, value: Any) -> None:
    """Raise TypeError, ValueError, AttributeError or re.error for a value of another kind."""
    if name in _NUMBERS:
        patterns = (value or {}).items() if name.endswith("_pattern") else [("", value)]
        for pattern, number in patterns:
            re.compile(_ending(pattern))
            check_adapter(**{"rank": 1, "alpha": 1} | {_NUMBERS[name]: number})
    elif name.startswith("use_") and not isinstance(value, (bool, type(None))):
        raise TypeError(f"must be true or false, got {value!r}")
    elif name in ("target_modules", "modules_to_save") and value is not None:
        expression = name == "target_modules" and isinstance(value, str)
        if not expression and not (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            raise TypeError(f"must be a list of names, got {value!r}")


def adapted_model(folder: Path) -> str:
    """Folder or hub id of the base model of an adapter folder.

    Raises:
        ValueError: the folder does not name one.
    """
    base = read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder} holds adapters, and base_model_name_or_path in {CONFIG} names no model: "
            "load the model, then call mllama.load_lora(model, folder)"
        )
    if (Path(base) / CONFIG).exists():
        raise ValueError(
            f"{folder / CONFIG}: base_model_name_or_path must be a whole model; {base} is a folder "
            "of adapters"
        )
    return base


def parse(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, torch.Tensor]]:
    """Sort PEFT's tensors.

    Returns:
        The parts of every layer under mllama's keys (`own_key`) with the file's names of layers;
        each layer's alpha; and other parameters (`learns` says which were trained).

    Raises:
        ValueError: a part of an adapter is missing; a rank or a layer differs from the config;
            tensors of another kind.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    trained = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := _KEY.fullmatch(name):
            parts.setdefault(found["name"], {})[own_key(name)] = tensor
        elif ".lora_" in key:  # of embeddings, or biases
            raise ValueError(
                f"{where}: {key} is not supported; only adapters of linear layers are, as "
                "NAME.lora_A.weight"
            )
        elif ".original_module." not in name:  # a module of modules_to_save before training
            trained[_WRAPPER.sub("", name)] = tensor
    dora = bool(config.get("use_dora"))
    dims = [2, 2, *[1] * dora]  # A, B, magnitudes
    if odd := [
        name
        for name, own in parts.items()
        if sorted((part.dim() for part in own.values()), reverse=True) != dims
    ]:
        expected = "two matrices and magnitudes (use_dora)" if dora else "two matrices"
        raise ValueError(f"{where}: expected {expected} each for {listing(odd)}")
    if (targets := config.get("target_modules")) and not isinstance(targets, str):
        ends = tuple(f".{target}" for target in targets)
        if outside := [name for name in parts if not f".{name}".endswith(ends)]:
            raise ValueError(f"{where}: target_modules does not name {listing(outside)}")
    if (saved := config.get("modules_to_save")) and not any(
        f"{module}." in name for module in saved for name in trained
    ):
        raise ValueError(
            f"{where}: modules_to_save names {listing(saved)}, whose values are missing"
        )
    alphas = {
        name: _alpha(where, config, name, own[f"{name}.lora_a.weight"].shape[0])
        for name, own in parts.items()
    }
    return {key: part for own in parts.values() for key, part in own.items()}, alphas, trained


def learns(config: Mapping[str, Any], name: str) -> bool:
    """Whether a parameter next to adapters was trained. Embeddings and heads were only if
    `modules_to_save` names them.
    """
    owner = name.rpartition(".")[0]
    return owner.rpartition(".")[2] not in _EMBEDDINGS or owner.endswith(
        tuple(config.get("modules_to_save") or ())
    )


def _alpha(where: str, config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha of a `Linear_LORA`, which scales the update by alpha / rank."""
    expected = _pattern(config.get("rank_pattern"), name, config.get("r", 8))
    if expected != rank:
        raise ValueError(f"{where}: {name} has rank {rank}, r and rank_pattern give {expected}")
    alpha = float(_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _ending(pattern: str) -> str:
    """The expression that a name matches if it ends with the pattern, as in PEFT."""
    return rf"(.*\.)?({pattern})$"


def _pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the name, as in PEFT."""
    return next(
        (value for pattern, value in (patterns or {}).items() if re.match(_ending(pattern), name)),
        otherwise,
    )


def write(
    folder: Path,
    layers: Mapping[str, Options],
    tensors: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    modules_to_save: Iterable[str],
    stock_name: Callable[[str], str],
    base: str | None,
) -> None:
    """Write an adapter folder atomically.

    Args:
        folder: created if needed; other files in it are kept.
        layers: what each layer's adapter was made with.
        tensors: NAME.lora_a.weight and NAME.lora_b.weight of each, and DoRA's magnitudes.
        trained: other parameters that the folder has, and embeddings that stay frozen.
        modules_to_save: the modules that were trained in full.
        stock_name: maps the model's name of a module or parameter to that of transformers' class.
        base: folder or hub id of the base model.

    Raises:
        ValueError: the folder holds a whole model; only some layers have magnitudes.
    """
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds a whole model (config.json), which adapters must not overwrite: "
            "choose another folder"
        )
    renamed = {f"{PREFIX}{_peft_key(stock_name(key))}": tensor for key, tensor in tensors.items()}
    renamed |= {PREFIX + stock_name(name): tensor for name, tensor in trained.items()}
    config = _config(layers, modules_to_save, stock_name, base)

    def fill(aside: Path) -> None:
        write_json(aside / CONFIG, config)
        save_tensors(aside / ADAPTERS, renamed)
        # the same file under the name by which transformers' Trainer finds a checkpoint's weights
        try:
            os.link(aside / ADAPTERS, aside / WEIGHTS)
        except OSError:
            shutil.copyfile(aside / ADAPTERS, aside / WEIGHTS)

    write_folder(folder, fill, replaced=(PICKLE,))


def _peft_key(key: str) -> str:
    """The inverse of `own_key`."""
    key = re.sub(r"lora_magnitude\.weight$", "lora_magnitude_vector", key)
    return re.sub(r"lora_([ab])\.weight$", lambda found: f"lora_{found[1].upper()}.weight", key)


def _config(
    layers: Mapping[str, Options],
    modules_to_save: Iterable[str],
    stock_name: Callable[[str], str],
    base: str | None,
) -> dict[str, Any]:
    """Content of adapter_config.json. It lists every layer under mllama's and transformers' name,
    so that either class loads it.
    """

    def both(name: str) -> list[str]:
        return list(dict.fromkeys([name, stock_name(name)]))

    (dora, *mixed) = {layer.dora for layer in layers.values()}
    if mixed:
        raise ValueError("PEFT's format needs DoRA's magnitudes in all layers or in none")
    rank, alpha, dropout = (
        Counter(values).most_common(1)[0][0]
        for values in zip(
            *((layer.rank, _number(layer.alpha), layer.dropout) for layer in layers.values()),
            strict=True,
        )
    )
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": int(rank),
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({each for name in layers for each in both(name)}),
        "rank_pattern": {
            each: int(layer.rank)
            for name, layer in layers.items()
            if layer.rank != rank
            for each in both(name)
        },
        "alpha_pattern": {
            each: _number(layer.alpha)
            for name, layer in layers.items()
            if layer.alpha != alpha
            for each in both(name)
        },
        "modules_to_save": sorted({each for name in modules_to_save for each in both(name)})
        or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": dora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def trained_whole(model: nn.Module, adapted: Iterable[nn.Parameter]) -> tuple[list[str], list[str]]:
    """Names of modules that are trained as a whole next to adapters, and of other trained
    parameters.
    """
    adapters = {id(parameter) for parameter in adapted}

    def is_trained(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad and id(parameter) not in adapters

    modules, loose = [], []

    def visit(module: nn.Module, name: str) -> None:
        parameters = list(module.parameters())
        if not any(map(is_trained, parameters)):
            return
        inside = isinstance(module, Linear_LORA)  # PEFT has no names for its parts
        if name and not inside and all(map(is_trained, parameters)):
            modules.append(name)
            return
        for own, parameter in module.named_parameters(recurse=inside):
            if is_trained(parameter):
                loose.append(f"{name}.{own}" if name else own)
        for child_name, child in () if inside else module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return modules, loose
