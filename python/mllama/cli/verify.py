"""`mllama verify FOLDER`: is this model, here, what stock transformers says it is, and the same cached, batched and plain?

Transformers runs first and is let go before this package's model is loaded: its stages' outputs stay, the two models never stand side by
side. Tokens and pixels are random, from a seed.
"""

import argparse
import functools
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mllama._device import choose_device
from mllama.api import find_model, model_class
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.models import survey
from mllama.cli._samples import Sample, make_samples
from mllama.cli._stock import load_stock
from mllama.memory import plan_of
from mllama.siglip import SiglipModel

_ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TIMES = 2  # in half precision: how much further than transformers' own rounding takes it from its float32 run


class Check(NamedTuple):
    """One line of the table: what was compared, the largest relative difference, and how large it may be."""

    stage: str
    difference: float
    allowed: float

    @property
    def ok(self) -> bool:
        """NaN is not."""
        return self.difference <= self.allowed


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the exit code is 1 where a line of it fails."""
    folder, device, dtype = find_model(arguments.folder), choose_device(arguments.device), getattr(torch, arguments.dtype)
    with (opened := open_checkpoint(folder)).source:
        config, kind = opened.config, model_class(opened.config)
        model, report = survey(kind, opened)
        report.check(opened.source.where)
        plan = plan_of(model)
    samples = make_samples(plan, getattr(config, "image_token_index", None), arguments.seed, device)
    try:
        stages = _run_stock(functools.partial(load_stock, folder), dtype, samples[0])
        against = f"stock transformers {transformers.__version__}"
    except ValueError as error:
        stages, against = None, f"itself alone: {error}"
    options = {"reference": "hf"} if "reference" in kind.load_options else {}
    model = kind.from_pretrained(folder, dtype=dtype, device_map=device, **options)
    if stages and plan.fusion == "cross_attention":
        against += ', whose Llama-3.2-Vision is reference="hf"'
    with torch.inference_mode():
        checks = [] if stages is None else _compare(model, samples[0], stages)
        if plan.text is not None:
            if options:
                model.reference = arguments.reference
            allowed = _ALLOWED[dtype]
            checks.append(Check("cached = uncached", _cached(model, samples[0]), allowed))
            checks.append(Check("batched = single", _batched(model, samples), allowed))
    passed = all(check.ok for check in checks)
    if arguments.json:
        rows = [check._asdict() | {"ok": check.ok} for check in checks]
        print(json.dumps({"folder": str(folder), "dtype": arguments.dtype, "against": against, "checks": rows, "ok": passed}))
    else:
        print(f"{folder}: {config.model_type} in {arguments.dtype}, against {against}")
        print(f"{'stage':20}{'difference':>12}{'allowed':>10}")
        for check in checks:
            print(f"{check.stage:20}{check.difference:12.1e}{check.allowed:10.1e}  {'ok' if check.ok else 'FAIL'}")
    return 0 if passed else 1


class _Expected(NamedTuple):
    """What transformers says of a stage: its output, and how far from it ours may be."""

    value: torch.Tensor
    allowed: float


def _run_stock(load: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype, sample: Sample) -> dict[str, _Expected]:
    """Every stage in float32; in another dtype what is allowed goes by how far transformers itself comes from that.

    Raises:
        ValueError: transformers does not read the files.
    """
    values: dict[str, torch.Tensor] = {}
    _watch_stock(load, torch.float32, sample, values.__setitem__)
    if dtype == torch.float32:
        return {stage: _Expected(value, _ALLOWED[torch.float32]) for stage, value in values.items()}
    errors: dict[str, float] = {}
    _watch_stock(load, dtype, sample, lambda stage, value: errors.__setitem__(stage, difference(value, values[stage])))
    least = torch.finfo(dtype).eps
    return {stage: _Expected(value, max(_TIMES * errors[stage], least)) for stage, value in values.items()}


def _watch_stock(
    load: Callable[[torch.dtype], PreTrainedModel], dtype: torch.dtype, sample: Sample, tell: Callable[[str, torch.Tensor], None]
) -> None:
    stock = load(dtype).to(sample.device)
    base = getattr(stock, "model", stock)
    tower = getattr(base, "vision_tower", None) or getattr(base, "vision_model", None)
    if isinstance(stock, transformers.SiglipVisionModel):
        stages = _stages(stock, None, stock)
    else:
        stages = _stages(tower, getattr(base, "multi_modal_projector", None), getattr(base, "language_model", base))
    with torch.inference_mode():
        _watch(stock, stages, sample, tell)
    del stock, base, tower, stages
    gc.collect()


def _compare(model: PreTrainedModel, sample: Sample, stages: dict[str, _Expected]) -> list[Check]:
    """Our stages against transformers', which are forgotten one by one."""
    checks: list[Check] = []

    def tell(stage: str, value: torch.Tensor) -> None:
        expected = stages.pop(stage)
        checks.append(Check(stage, difference(value, expected.value), expected.allowed))

    alone = isinstance(model, SiglipModel)
    own = _stages(
        getattr(model, "vision_tower", None),
        getattr(model, "multi_modal_projector", None),
        model.vision_tower if alone else model.language_model,
    )
    _watch(model, own, sample, tell)
    return checks + [Check(stage, float("nan"), expected.allowed) for stage, expected in stages.items()]


def _stages(tower: nn.Module | None, projector: nn.Module | None, stack: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether its output or its input is meant), by parts that ours and transformers' have in common."""
    if tower is not None:
        yield "patches", _find(tower, "patch_embedding"), True
    if projector is not None:
        yield "tower", projector, False
        yield "projector", projector, True
    layers = _find(stack, "layers")
    yield "embeddings", layers[0], False
    for number, layer in enumerate(layers):
        yield f"layer {number}", layer, True


def _find(module: nn.Module, name: str) -> nn.Module:
    return next(found for path, found in module.named_modules() if path.split(".")[-1] == name)


def _watch(model: PreTrainedModel, stages, sample: Sample, tell: Callable[[str, torch.Tensor], None]) -> None:
    """Run a model and tell of each stage's value, and of what it returns."""

    def after(stage: str, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if value.dim() == 4 and stage == "patches":  # a convolution's [pictures, width, rows, columns]
            value = value.flatten(2).transpose(1, 2)
        tell(stage, _kept(value))

    def before(stage: str, args: tuple, kwargs: dict) -> None:
        tell(stage, _kept(args[0] if args else kwargs["hidden_states"]))

    hooks = []
    for stage, module, out in stages:
        if out:
            hooks.append(module.register_forward_hook(lambda module, args, output, stage=stage: after(stage, output)))
        else:
            hooks.append(
                module.register_forward_pre_hook(lambda module, args, kwargs, stage=stage: before(stage, args, kwargs), with_kwargs=True)
            )
    try:
        output = model(**sample.inputs, **({"use_cache": False} if sample.length else {}))
    finally:
        for hook in hooks:
            hook.remove()
    for stage in ("logits", "last_hidden_state", "pooler_output"):
        if (value := getattr(output, stage, None)) is not None:
            tell(stage.replace("_", " "), _kept(value))


def _kept(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a vector (the last axis) relative to its largest value, or to the tensor's mean value where that is more.

    By vector, since some tokens' states are thousands of times larger than others' and would hide these. Infinite where sizes differ.
    """
    if found.numel() != expected.numel() or found.shape[-1] != expected.shape[-1]:
        return float("inf")
    found, expected = found.flatten(0, -2), expected.flatten(0, -2)
    scale = expected.abs().amax(-1).clamp(min=max(float(expected.abs().mean()), 1e-30))
    return float(((found - expected).abs().amax(-1) / scale).max())


def _cached(model: PreTrainedModel, sample: Sample) -> float:
    """The last tokens one by one, on what the cache holds of the others, against one run over all."""
    plain = model(**sample.inputs, use_cache=False).logits
    first = model(**sample.cut(0, sample.prompt), use_cache=True)
    logits, cache = [first.logits], first.cache
    for token in range(sample.prompt, sample.length):
        logits.append(model(**sample.cut(token, token + 1), cache=cache, use_cache=True).logits)
    return difference(_kept(torch.cat(logits, 1)), _kept(plain))


def _batched(model: PreTrainedModel, samples: list[Sample]) -> float:
    """Rows of unequal lengths, padded on the left, against each by itself."""
    together = model(**Sample.join(samples), use_cache=False).logits
    return max(
        difference(_kept(logits[-sample.length :]), _kept(model(**sample.inputs, use_cache=False).logits[0, -sample.length :]))
        for logits, sample in zip(together, samples, strict=True)
    )
