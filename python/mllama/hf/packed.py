"""Packed models as transformers models: saving, tied weights."""

import os

import torch
from transformers import PreTrainedModel

from mllama.checkpoints.files import listing, save_packed
from mllama.checkpoints.loading import check_complete
from mllama.config.packing import FIELD, packing_field
from mllama.hf.checkpoints import check_readable, plain_keys, versions, write_model
from mllama.hf.config_objects import file_content
from mllama.nn.packed import FORMAT, PACKED, PackedFormat
from mllama.quant.packer import HEAD, is_tied, packing_of


def save_packed_model(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a packed model atomically, as docs/packed-weights.md describes.

    Args:
        model, folder, state_dict, max_shard_size: as `mllama.hf.checkpoints.save_model` takes them.

    Raises:
        ValueError: the config describes another model; `state_dict` has missing or unknown tensors,
            or weights in other formats than the model's.
    """
    own = plain_keys(model.state_dict())
    tied = _tied_names(model)
    if state_dict is None:
        state_dict = own
    else:
        check_complete(state_dict.keys(), own.keys() - tied, own.keys())
        _check_formats(state_dict, own)
    tensors = {name: tensor for name, tensor in state_dict.items() if name not in tied}
    content, _ = file_content(model.config)
    content |= versions(model, tensors) | {FIELD: packing_field(packing_of(model))}
    content.pop("dtype", None)
    plain = {name: value for name, value in content.items() if name != FIELD}
    check_readable(model, plain, _dense_shapes(tensors))
    write_model(model, folder, content, lambda aside: save_packed(aside, tensors, max_shard_size))


def _tied_names(model: PreTrainedModel) -> set[str]:
    return {f"{HEAD}.{PACKED}", f"{HEAD}.{FORMAT}"} if is_tied(model) else set()


def _check_formats(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    unlike = [
        f"{name}: {PackedFormat.from_tensor(text)} for {PackedFormat.from_tensor(own[name])}"
        for name, text in state.items()
        if name.endswith(f".{FORMAT}") and not torch.equal(text, own[name])
    ]
    if unlike:
        raise ValueError(f"state_dict has weights in other formats: {listing(unlike)}")


def _dense_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A packed state as a dense one on the meta device."""
    dense = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if f"{owner}.{FORMAT}" not in tensors or last not in (PACKED, FORMAT):
            dense[name] = tensor
        elif last == FORMAT:
            shape = PackedFormat.from_tensor(tensor)[1:]
            dense[f"{owner}.weight"] = torch.empty(shape, device="meta")
    return dense
