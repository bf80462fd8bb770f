"""Meta's reference code (PyPI's llama-models, installed without its dependencies) in one process:
the oracle of what follows Meta.

The package's parallel layers come from fairscale and its images go through torchvision. Neither
is needed here: in one process a parallel layer is a plain one, and tests hand over finished
tensors.
"""

import importlib
import sys
import types

import pytest
import torch
from torch import nn


class ColumnParallelLinear(nn.Linear):
    """Cut along its outputs when it is shared out."""

    def __init__(self, inputs, outputs, bias=True, gather_output=True, init_method=None):
        super().__init__(inputs, outputs, bias)


class RowParallelLinear(nn.Linear):
    """Cut along its inputs when it is shared out; each shard has the whole bias."""

    def __init__(self, inputs, outputs, bias=True, input_is_parallel=False, init_method=None):
        super().__init__(inputs, outputs, bias)


class VocabParallelEmbedding(nn.Embedding):
    """Cut along the vocabulary when it is shared out."""

    def __init__(self, rows, width, init_method=None):
        super().__init__(rows, width)


def _modules() -> dict[str, types.ModuleType]:
    """What the package imports and need not have."""
    names = ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel")
    found = {name: types.ModuleType(name) for name in names}
    initialize, layers = (
        types.ModuleType(f"{names[-1]}.{name}") for name in ("initialize", "layers")
    )
    initialize.get_model_parallel_world_size = lambda: 1
    initialize.get_model_parallel_rank = lambda: 0
    for layer in (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding):
        setattr(layers, layer.__name__, layer)
    found["fairscale.nn.model_parallel"].initialize = initialize
    transform = types.ModuleType("llama_models.llama3.multimodal.image_transform")
    transform.VariableSizeImageTransform = lambda size: lambda *image, **options: None
    utils = types.ModuleType("llama_models.llama3.multimodal.utils")
    utils.get_negative_inf_value = lambda dtype: torch.finfo(dtype).min
    utils.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)
    return found | {module.__name__: module for module in (initialize, layers, transform, utils)}


def load(name: str) -> types.ModuleType:
    """A module of the package: "model", "multimodal.model" ...; the test is skipped where the
    package is not installed.
    """
    pytest.importorskip(
        "llama_models",
        reason="llama-models is not installed (pip install --no-deps llama-models==0.3.0)",
    )
    stubs = {name: module for name, module in _modules().items() if name not in sys.modules}
    sys.modules.update(stubs)
    module = importlib.import_module(f"llama_models.llama3.{name}")
    if name == "multimodal.model":
        module.reduce_from_tensor_model_parallel_region = (
            module.gather_from_tensor_model_parallel_region
        ) = lambda tensor: tensor
    return module


def shards(model: nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    """A reference model's weights as so many parallel processes would save them."""
    axes = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear):
            axes |= {f"{prefix}.weight": 0, f"{prefix}.bias": 0}
        elif isinstance(module, RowParallelLinear):
            axes[f"{prefix}.weight"] = 1
        elif isinstance(module, VocabParallelEmbedding):
            axes[f"{prefix}.weight"] = 0
    parts = [{} for _ in range(count)]
    for name, tensor in model.state_dict().items():
        cut = tensor.chunk(count, axes[name]) if name in axes else [tensor] * count
        for part, piece in zip(parts, cut, strict=True):
            part[name] = piece.clone()
    return parts


def vision_model(params: dict, **encoder) -> nn.Module:
    """The reference's Llama-3.2-Vision, its encoder changed from the released size by
    VisionEncoder's arguments.
    """
    code = load("multimodal.model")
    original, width = code.VisionEncoder, encoder["width"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "VisionEncoder", lambda **given: original(**given | encoder))
        model = code.CrossAttentionTransformer(code.ModelArgs(**params))
    vision = model.vision_model
    vision.vision_projection = ColumnParallelLinear(
        (len(encoder["return_intermediate"]) + 1) * width, params["dim"]
    )
    return model


def vision_logits(
    model: nn.Module,
    tokens: torch.Tensor,
    images: torch.Tensor,
    ratios: torch.Tensor,
    spans: list[list[list[int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference computes of finished tiles.

    Args:
        model: of `vision_model`.
        tokens: int [B, T].
        images: [B, N, tiles, 3, size, size], empty tiles zero.
        ratios: int [B, N, 2], (tiles high, tiles wide).
        spans: for each row and image the positions [start, end) that see it; end -1 is the row's
            end.

    Returns:
        (the encoder's features [B, N, tiles, tokens, width * states], logits [B, T, vocabulary])
    """
    code, text = load("multimodal.model"), model.text_model
    (batch, length), tiles = tokens.shape, images.shape[2]
    text.setup_cache(batch, tokens.device, torch.float32)
    features = model.vision_model.vision_encoder(images, ratios)
    projected = model.vision_model(images, ratios)
    caches = torch.stack(
        [
            layer.compute_xattn_kv_cache(projected.flatten(1, 3))
            for layer in text.cross_attention_layers
        ]
    )
    filled = [
        [int(high * wide) for high, wide in row[: len(spans[index])]]
        for index, row in enumerate(ratios)
    ]
    masks = code._pad_masks(spans, filled, length, tiles)
    mask, rows = text._get_xattn_mask(length, "cpu", torch.float32, projected, masks)
    return features, model(torch.arange(length), tokens, mask, rows, caches)
