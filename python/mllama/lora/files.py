"""Adapters in files: the package's own, `NAME.lora_a.weight` and `NAME.lora_b.weight` by dotted
names, and PEFT's folders.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllama.checkpoints.files import listing, save_tensors, write_file
from mllama.checkpoints.meta.source import MetaSource
from mllama.checkpoints.sources import SafetensorsSource, open_file
from mllama.lora import peft
from mllama.lora.convert import linear_layers, put_adapters
from mllama.lora.layer import (
    Linear_LORA,
    check_adapter,
    holds_adapters,
    lora_layers,
    needed_lora_layers,
)
from mllama.nn.wrappers import (
    gathered,
    is_sharded,
    may_write,
    plain_key,
    plain_name,
    put,
    unwrapped,
    whole,
)
from mllama.ops._dispatch import kind

FORMATS = ("mllama", "peft")
_PARTS = ("lora_a", "lora_b")
_PEFT_PART = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")
_LAYER = re.compile(r"((?P<name>.*)\.)?(?P<part>lora_[ab])\.weight")


@dataclass
class Adapters:
    """What a file says.

    Attributes:
        tensors: NAME.lora_a.weight and NAME.lora_b.weight of every layer.
        alphas: by layer; empty where the file does not know them.
        trained: further parameters, by name.
        dropout: of the layers, in training.
        frozen: names among `trained` of what did not learn: the matrices of embeddings and heads,
            which PEFT writes beside adapters.
    """

    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float]
    trained: dict[str, torch.Tensor] = field(default_factory=dict)
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()


def save_lora(model: nn.Module, path: str | os.PathLike, format: str = "mllama") -> None:
    """Write the adapters, whole or not at all. The folder is made if absent.

    What torch.compile, DDP and FSDP put into names is left out. Of a model that is sharded over
    processes every process must call this; the first one writes.

    Args:
        model: with LoRA layers.
        path: a safetensors file, or of PEFT's format a folder.
        format: "mllama", one file with the alpha of each layer, of the adapters alone; or "peft", a
            folder that `peft.PeftModel` loads onto this model or transformers' own class of it,
            with the modules that learnt as a whole beside the adapters.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers; another format; a path of the other kind, or a folder
            that holds a whole model; in PEFT's format parameters that learn beside adapters of the
            same module.
    """
    needed_lora_layers(model)
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "peft":
        return save_adapter_folder(model, path)
    if path.is_dir():
        raise ValueError(
            f"path must be a file, such as {path / 'adapters.safetensors'}; {path} is a folder"
        )
    layers = _plain_layers(model)
    with gathered(model):
        tensors = _adapter_tensors(layers)
        alphas = json.dumps({name: float(layer.alpha) for name, layer in layers.items()})
        if may_write(model):
            write_file(path, lambda aside: save_tensors(aside, tensors, alpha=alphas))


def save_adapter_folder(
    model: nn.Module,
    folder: Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    strict: bool = True,
) -> None:
    """`save_lora` in PEFT's format.

    Args:
        state_dict: takes the place of the model's own. It is whole, so that no other process takes
            part.
        strict: False warns where PEFT could not read all of it, instead of raising: the package
            can.

    Where other adapters were added to the model's weights for good, the folder does not say which
    model it is for: none that is in a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder in PEFT's format; {folder} is a file")
    inner, layers = unwrapped(model), _plain_layers(model)
    adapters = [parameter for layer in layers.values() for parameter in layer.adapter()]
    modules, loose = (
        [plain_name(model, name) for name in names] for names in peft.trained_whole(model, adapters)
    )
    if loose:
        said = f"PEFT's format has no place for parameters that learn beside adapters of the same module: {listing(loose)}"
        if strict:
            raise ValueError(f"{said}. Freeze them, or save them by hand")
        warnings.warn(f"{said}. They are written for mllama to read", stacklevel=3)
    with gathered(model) if state_dict is None else nullcontext():
        if state_dict is None:
            own: dict[str, torch.Tensor] = {
                plain_name(model, name): parameter
                for name, parameter in model.named_parameters(remove_duplicate=False)
            }
            tensors = _adapter_tensors(layers)
        else:
            own = {plain_key(name): tensor for name, tensor in state_dict.items()}
            tensors = {
                key: _own(own, key)
                for name in layers
                for key in (_key(name, part) for part in _PARTS)
            }
        inside = tuple(f"{name}." for name in modules)
        trained = {
            name: _copied(tensor)
            for name, tensor in own.items()
            if name in loose or name.startswith(inside)
        }
        base = (
            None
            if holds_adapters(inner)
            else getattr(getattr(inner, "config", None), "name_or_path", None) or None
        )
        if may_write(model):
            peft.write(
                folder, layers, tensors, trained, modules, getattr(inner, "stock_name", str), base
            )


def load_lora(model: nn.Module, path: str | os.PathLike) -> None:
    """Read adapters: a file of `save_lora`, PEFT's folder or the file in it, or a .pth of the
    file's names.

    The values are cast to the adapters' dtype. A model without LoRA layers is converted as the file
    says: the layers it names, frozen but for adapters of its ranks and alphas, with PEFT's dropout.
    A .pth does not know alphas, and takes a converted model. Merged layers are merged anew. Names
    may be the model's, or those that transformers' class and its files have, with or without the
    parts of wrappers (torch.compile, DDP, FSDP). What PEFT trained as a whole (`modules_to_save`)
    is put in the place of the model's own, and learns on.

    Raises:
        FileNotFoundError: no such file, or a folder without adapters.
        TypeError: model is no module.
        ValueError: a broken file, or one that holds no adapters, or anything but tensors; a field
            of PEFT's config that is not honored, by its name; or the model and the file do not fit:
            every unknown or missing name, every other shape and every other alpha in one error, and
            nothing is loaded.
    """
    path = Path(path)
    layers = _plain_layers(model)
    found = _inside(_named_as(model, _read(path)), layers)
    places = _places(model, found)
    _check_tied(model, path, found)
    if layers:
        shapes = {
            _key(name, part): _shape(layer, part)
            for name, layer in layers.items()
            for part in _PARTS
        }
        _check_fit(path, found.tensors | found.trained, shapes | places)
        trained = {name: found.alphas.get(name, layer.alpha) for name, layer in layers.items()}
        if other := [
            f"{name} {alpha}, not {layers[name].alpha}"
            for name, alpha in trained.items()
            if not _same(alpha, layers[name].alpha)
        ]:
            raise ValueError(
                f"the adapters in {path} were trained with another alpha: {listing(other)}"
            )
    else:
        layers = _convert(model, path, found, places)
        found = _inside(found, layers)
    with gathered(model, write=True), torch.no_grad():
        for name, layer in layers.items():
            for part in _PARTS:
                put(getattr(layer, part).weight, found.tensors[_key(name, part)])
            if layer.merged_weight is not None:
                layer.merge()
        for name, parameter in _parameters(model).items():
            if name in found.trained:
                put(parameter, found.trained[name])
                parameter.requires_grad_(name not in found.frozen)


def _convert(
    model: nn.Module, path: Path, found: Adapters, places: Mapping[str, tuple[int, ...]]
) -> dict[str, Linear_LORA]:
    """Adapt the layers that the file names, where all of it fits."""
    if not found.alphas:
        raise ValueError(
            f"this {type(model).__name__} has no LoRA layers, and {path} does not say which alpha to make them with: call"
            " mllama.convert_linears_to_lora(model, rank, alpha) first"
        )
    if is_sharded(model):
        raise ValueError(
            "this model is sharded and has no LoRA layers: load or convert it before it is sharded"
        )
    chosen: dict[nn.Linear, tuple[int, float]] = {}
    shapes: dict[str, tuple[int, ...]] = dict(places)
    for name, linear in linear_layers(model).items():
        name = plain_name(model, name)
        down = found.tensors.get(_key(name, "lora_a"))
        if (
            name and name in found.alphas and down is not None
        ):  # a lone layer cannot be replaced from within
            rank = max([1, *down.shape[:1]])
            chosen[linear] = rank, found.alphas[name]
            shapes |= {
                _key(name, "lora_a"): (rank, linear.in_features),
                _key(name, "lora_b"): (linear.out_features, rank),
            }
    _check_fit(path, found.tensors | found.trained, shapes)
    # Under each name of a shared layer: the file may use another one than the first here.
    made = put_adapters(model, chosen, found.dropout)
    made = {plain_name(model, name): layer for name, layer in made.items()}
    return {name: layer for name, layer in made.items() if _key(name, "lora_a") in found.tensors}


def _check_fit(
    path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """One error of all that does not fit."""
    problems = {
        "not in the model": [name for name in tensors if name not in shapes],
        "not in the file": [name for name in shapes if name not in tensors],
        "of another shape or type": [
            f"{name} is {kind(tensors[name])}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors
            and (tensors[name].shape != shape or not tensors[name].is_floating_point())
        ],
    }
    if any(problems.values()):
        said = "; ".join(
            f"{what} ({len(names)}): {listing(names)}" for what, names in problems.items() if names
        )
        raise ValueError(f"the adapters in {path} do not fit: {said}")


def _plain_layers(model: nn.Module) -> dict[str, Linear_LORA]:
    return {plain_name(model, name): layer for name, layer in lora_layers(model).items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _places(model: nn.Module, found: Adapters) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that the file has beside adapters."""
    return (
        {
            name: tuple(parameter.shape)
            for name, parameter in _parameters(model).items()
            if name in found.trained
        }
        if found.trained
        else {}
    )


def _check_tied(model: nn.Module, path: Path, found: Adapters) -> None:
    """PEFT trains a copy of one of several tied parameters; here all of them would change. What is
    frozen may be as it is.
    """
    sharing: dict[nn.Parameter, list[str]] = {}
    for name, parameter in _parameters(model).items():
        sharing.setdefault(parameter, []).append(name)
    for parameter, names in sharing.items():
        here = [name for name in names if name in found.trained]
        given = [found.trained[name] for name in here]
        if found.frozen.issuperset(here) and all(_holds(parameter, value) for value in given):
            continue
        if given and (
            len(given) < len(names) or not all(torch.equal(given[0], other) for other in given[1:])
        ):
            raise ValueError(
                f"modules_to_save in {path}: {' and '.join(names)} are one parameter in this model, and the file has other values"
            )


def _holds(parameter: nn.Parameter, value: torch.Tensor) -> bool:
    return value.shape == parameter.shape and torch.equal(value.to(parameter), whole(parameter))


def _inside(found: Adapters, layers: Mapping[str, Linear_LORA]) -> Adapters:
    """The weights of layers that have adapters stand one level deeper in the model than in PEFT's
    files.
    """

    def moved(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.linear.{leaf}" if owner in layers else name

    trained = {moved(name): tensor for name, tensor in found.trained.items()}
    return replace(found, trained=trained, frozen=frozenset(map(moved, found.frozen)))


def _shape(layer: Linear_LORA, part: str) -> tuple[int, int]:
    """Of a weight that FSDP may hold in another one."""
    return (layer.rank, layer.in_features) if part == "lora_a" else (layer.out_features, layer.rank)


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * abs(other)  # PEFT's are multiplied by a root


def _adapter_tensors(layers: Mapping[str, Linear_LORA]) -> dict[str, torch.Tensor]:
    return {
        _key(name, part): _copied(getattr(layer, part).weight)
        for name, layer in layers.items()
        for part in _PARTS
    }


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).cpu().clone()


def _own(state_dict: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in state_dict:
        raise ValueError(f"state_dict is not this model's: it lacks {key}")
    return _copied(state_dict[key])


def _named_as(model: nn.Module, found: Adapters) -> Adapters:
    """The file's names brought to the model's, where it knows them by others."""
    known = {plain_name(model, name) for name, _ in model.named_modules(remove_duplicate=False)}
    translate: Callable[[set[str]], dict[str, str]] = getattr(
        unwrapped(model), "own_names", lambda names: {}
    )

    def own(names: Iterable[str]) -> dict[str, str]:
        """Of modules, which files name by their weights."""
        plain = {name: name if name in known else plain_key(name) for name in names}
        named = translate({f"{name}.weight" for name in plain.values() if name not in known})
        return {
            name: named.get(f"{other}.weight", f"{other}.weight").removesuffix(".weight")
            for name, other in plain.items()
        }

    split = {key: _LAYER.fullmatch(key) for key in found.tensors}
    layers = own({*found.alphas, *(parts["name"] or "" for parts in split.values() if parts)})
    owners = own({name.rpartition(".")[0] for name in found.trained})
    named = {
        name: ".".join((owners[name.rpartition(".")[0]], name.rpartition(".")[2]))
        for name in found.trained
    }
    return Adapters(
        {
            _key(layers[parts["name"] or ""], parts["part"])
            if (parts := split[key])
            else key: tensor
            for key, tensor in found.tensors.items()
        },
        {layers[name]: alpha for name, alpha in found.alphas.items()},
        {named[name]: tensor for name, tensor in found.trained.items()},
        found.dropout,
        frozenset(named[name] for name in found.frozen),
    )


def own_adapters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT's tensors under the model's names, as a state dict of adapters alone."""
    renamed = {
        _PEFT_PART.sub(
            lambda found: f".lora_{found[1].lower()}.weight", key.removeprefix(peft.PREFIX)
        ): key
        for key in tensors
    }
    split: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
    for name, key in renamed.items():
        split[_LAYER.fullmatch(name) is not None][name] = tensors[key]
    found = _named_as(model, Adapters(split[True], {}, split[False]))
    return found.tensors | found.trained


def _read(path: Path) -> Adapters:
    """A file's or folder's tensors, by its own names."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        if (path / "config.json").exists() and not (path / peft.CONFIG).exists():
            raise ValueError(
                f"{path} holds a whole model, no adapters: it has config.json, and no {peft.CONFIG}"
            )
        if not (path / peft.CONFIG).exists():
            raise FileNotFoundError(
                f"{path} is no file of adapters, and as a folder it has no {peft.CONFIG}"
            )
        path = peft.weights_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file of adapters")
    tensors, alpha = _open(path)
    if peft.is_peft(tensors):
        if not (folder / peft.CONFIG).exists():
            raise ValueError(
                f"{path} holds PEFT's adapters, whose ranks and alphas {peft.CONFIG} says: it must lie beside the file"
            )
        config = peft.read_config(folder)
        layers, trained = peft.parse(str(folder), config, tensors)
        halves = {
            _key(name, part): half
            for name, (down, up, _) in layers.items()
            for part, half in zip(_PARTS, (down, up), strict=True)
        }
        alphas = {name: alpha for name, (*_, alpha) in layers.items()}
        frozen = frozenset(name for name in trained if not peft.learns(config, name))
        return Adapters(halves, alphas, trained, float(config.get("lora_dropout") or 0.0), frozen)
    if tensors and not any(".lora_" in f".{name}" for name in tensors):
        raise ValueError(
            f"{path} holds no adapters: its {len(tensors)} tensors are {listing(list(tensors)[:3])} ..., as a model's weights"
        )
    return Adapters(tensors, _alphas(path, alpha))


def _open(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors of a file, and what its metadata say of alphas."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        raise ValueError(
            f"{path} is a GGUF file, which holds a model: no adapters are read from it"
        )
    if start == b"PK\x03\x04":  # what torch.save writes
        with MetaSource(str(path), [path]) as source:
            return {name: source.read(name) for name in source.headers()}, None
    with open_file(path) as file:
        metadata, names = file.metadata() or {}, list(file.keys())
    with SafetensorsSource(str(path), dict.fromkeys(names, path)) as source:
        return {name: source.read(name) for name in source.headers()}, metadata.get("alpha")


def _alphas(path: Path, text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        alphas: Any = json.loads(text)
        if not isinstance(alphas, dict):
            raise TypeError(f"an object is needed, got {type(alphas).__name__}")
        for alpha in alphas.values():
            check_adapter(1, alpha)
            float(alpha)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} has no valid alphas in its metadata: {error}") from error
    return alphas


def _key(name: str, part: str) -> str:
    return f"{name}.{part}.weight" if name else f"{part}.weight"
