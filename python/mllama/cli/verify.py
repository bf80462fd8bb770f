"""`mllama verify FOLDER`: compare this model with stock transformers, and cached and batched runs
with plain ones.

Transformers runs first and is freed before this package's model is loaded: only the outputs of its
stages stay in memory. Tokens and pixels are random, from a seed. With an adapter, transformers'
model has it by PEFT, this package's by its own layers.
"""

import argparse
import functools
import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mllama.api import find_model
from mllama.checkpoints import open_checkpoint
from mllama.cli._answering import refuse_meta
from mllama.device import choose_device
from mllama.hf import names
from mllama.hf.models import model_class, survey_opened
from mllama.hf.names import PreTrainedModel
from mllama.hf.siglip import SiglipModel
from mllama.hf.stock import adapt_stock, load_stock
from mllama.lora.files import convert_adapter
from mllama.lora.loading import load_lora
from mllama.model.samples import Sample, make_samples

_FLOAT32 = 1e-4  # largest relative error of a vector in float32
_TIMES = 2  # in half precision: this times transformers' own distance from the float32 run


class Check(NamedTuple):
    """One line of the table: the stage, its relative difference as `Measure` computes it, and the
    tolerance.
    """

    stage: str
    difference: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether it passes; NaN does not."""
        return self.difference <= self.allowed


def run(arguments: argparse.Namespace) -> int:
    """Print the table; exit code 1 if a line fails."""
    folder, device, dtype = (
        find_model(arguments.folder),
        choose_device(arguments.device),
        getattr(torch, arguments.dtype),
    )
    with (opened := open_checkpoint(folder)).source:
        if opened.packing is not None:
            raise ValueError(
                f"{folder} has packed weights, which round activations: verify the model that they "
                "were packed from; mllama quantize compares both"
            )
        kind = model_class(opened.spec)
        model, report = survey_opened(opened)
        report.check(opened.source.where)
        spec = model.spec
    if arguments.reference == "meta":
        refuse_meta(opened.family.name)
    samples = make_samples(spec, spec.image_token_index, arguments.seed, device)
    measure = Measure.of(dtype)
    options = {"reference": "hf"} if "reference" in kind.load_options else {}
    own_options = options | {"device_map": device}
    load = functools.partial(_load, kind, folder, arguments.adapter, own_options)
    with _as_peft(arguments.adapter, model, folder) as peft_folder:
        try:
            stock = functools.partial(_load_stock, folder, peft_folder)
            expected = _expect(stock, _stock_stages, dtype, samples, measure)
            against = f"stock transformers {names.__version__}{' and PEFT' * bool(peft_folder)}"
        except ValueError as error:
            if arguments.adapter is not None:
                raise ValueError(f"--adapter has nothing to be compared with: {error}") from error
            expected, against = {}, f"itself alone: {error}"
    if expected and spec.has_tiles:
        against += ', whose Llama-3.2-Vision is reference="hf"'
    allowed = _FLOAT32
    if dtype != torch.float32 and spec.text is not None:
        bounds = expected or _expect(load, lambda model: (), dtype, samples, measure)
        allowed = bounds["logits"].allowed
    model = load(dtype)
    with torch.inference_mode():
        checks = _compare(model, samples, expected, measure) if expected else []
        if spec.text is not None:
            if options:
                model.reference = arguments.reference or "meta"
            checks.append(Check("cached = uncached", _cached(model, samples[0], measure), allowed))
            checks.append(Check("batched = single", _batched(model, samples, measure), allowed))
    passed = all(check.ok for check in checks)
    if arguments.json:
        rows = [check._asdict() | {"ok": check.ok} for check in checks]
        print(
            json.dumps(
                {
                    "folder": str(folder),
                    "adapter": arguments.adapter,
                    "dtype": arguments.dtype,
                    "against": against,
                    "checks": rows,
                    "ok": passed,
                }
            )
        )
    else:
        adapted = "" if arguments.adapter is None else f" with {arguments.adapter}"
        print(f"{folder}: {opened.family.name} in {arguments.dtype}{adapted}, against {against}")
        print(f"{'stage':20}{'difference':>12}{'allowed':>10}")
        for check in checks:
            print(
                f"{check.stage:20}{check.difference:12.1e}{check.allowed:10.1e}  "
                f"{'ok' if check.ok else 'FAIL'}"
            )
    return 0 if passed else 1


def _load(
    kind: Any, folder: Path, adapter: str | None, options: dict[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    """This package's model, with the adapter."""
    model = kind.from_pretrained(folder, dtype=dtype, **options)
    if adapter is not None:
        load_lora(model, adapter)
    return model


def _load_stock(folder: Path, peft_folder: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model, with the adapter by PEFT."""
    model = load_stock(folder, dtype)
    return model if peft_folder is None else adapt_stock(model, peft_folder)


@contextmanager
def _as_peft(adapter: str | None, model: PreTrainedModel, folder: Path) -> Iterator[Path | None]:
    """A temporary folder with the adapter in PEFT's format; None without one. `model` is this
    package's, on the meta device.

    Raises:
        FileNotFoundError, ValueError: as `mllama.load_lora`.
    """
    if adapter is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as aside:
        converted = Path(aside) / "adapter"
        convert_adapter(adapter, converted, "peft", model, str(folder))
        load_lora(model, adapter)  # raises if it does not fit
        yield converted


class Measure(NamedTuple):
    """The distance of two tensors relative to the second, per vector along the last axis.

    float32 uses the worst element (order inf). Half precision uses the root mean square (order 2):
    its worst element is chance and changes with the machine's instruction set, the root mean
    square over all elements hardly does.
    """

    order: float

    @staticmethod
    def of(dtype: torch.dtype) -> "Measure":
        """The measure for a dtype."""
        return Measure(math.inf if dtype == torch.float32 else 2.0)

    def errors(self, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """The norm of each vector's difference, divided by its own norm, or by that of a vector of
        the tensor's mean value if larger.

        Per vector, because some tokens' states are thousands of times larger than others' and
        would hide their errors. Infinite where shapes differ.
        """
        if found.numel() != expected.numel() or found.shape[-1] != expected.shape[-1]:
            return torch.tensor([math.inf])
        found, expected = found.flatten(0, -2), expected.flatten(0, -2)  # (vectors, width)
        least = float(expected.abs().mean()) * expected.shape[-1] ** (1 / self.order)
        scale = torch.linalg.vector_norm(expected, self.order, -1).clamp(min=max(least, 1e-30))
        return torch.linalg.vector_norm(found - expected, self.order, -1) / scale

    def total(self, errors: list[torch.Tensor]) -> float:
        """The largest of many vectors' errors, or their root mean square."""
        joined = torch.cat(errors)
        return float(torch.linalg.vector_norm(joined, self.order)) / joined.numel() ** (
            1 / self.order
        )

    def difference(self, found: torch.Tensor, expected: torch.Tensor) -> float:
        """The error of one tensor against another."""
        return self.total([self.errors(found, expected)])


class _Expected(NamedTuple):
    """A stage's expected output for each sample in float32, and the tolerance."""

    values: list[torch.Tensor]
    allowed: float


def _expect(
    load: Callable[[torch.dtype], PreTrainedModel],
    stages_of: Callable,
    dtype: torch.dtype,
    samples: list[Sample],
    measure: Measure,
) -> dict[str, _Expected]:
    """Expected output of every stage in float32. In another dtype the tolerance is proportional to
    the error of the reference model in that dtype.

    Raises:
        ValueError: `load` cannot read the files.
    """
    values: dict[str, list[torch.Tensor]] = {}
    _run(
        load(torch.float32),
        stages_of,
        samples,
        lambda stage, value: values.setdefault(stage, []).append(value),
    )
    if dtype == torch.float32:
        return {stage: _Expected(found, _FLOAT32) for stage, found in values.items()}
    errors = _Errors(values, measure)
    _run(load(dtype), stages_of, samples, errors.add)
    least = torch.finfo(dtype).eps  # a stage with one rounding, which transformers may do without
    return {
        stage: _Expected(found, max(_TIMES * errors.total(stage), least))
        for stage, found in values.items()
    }


class _Errors:
    """Errors of stages, collected sample by sample."""

    def __init__(self, expected: dict[str, list[torch.Tensor]], measure: Measure):
        self._expected, self._measure = expected, measure
        self._errors: dict[str, list[torch.Tensor]] = {}

    def add(self, stage: str, value: torch.Tensor) -> None:
        """Add the next sample's value."""
        before = self._errors.setdefault(stage, [])
        before.append(self._measure.errors(value, self._expected[stage][len(before)]))

    def total(self, stage: str) -> float:
        """The error over all samples; NaN if the stage never ran."""
        return self._measure.total(self._errors[stage]) if stage in self._errors else math.nan


def _run(
    model: PreTrainedModel,
    stages_of: Callable,
    samples: list[Sample],
    tell: Callable[[str, torch.Tensor], None],
) -> None:
    """Run all samples and free the model."""
    model = model.to(samples[0].device)
    with torch.inference_mode():
        for sample in samples:
            _watch(model, stages_of(model), sample, tell)
    del model
    gc.collect()


def _stock_stages(stock: PreTrainedModel) -> Iterator[tuple[str, nn.Module, bool]]:
    base = getattr(stock, "model", stock)
    encoder = getattr(base, "vision_tower", None) or getattr(base, "vision_model", None)
    if isinstance(stock, names.SiglipVisionModel):
        return _stages(stock, None, stock)
    return _stages(
        encoder, getattr(base, "multi_modal_projector", None), getattr(base, "language_model", base)
    )


def _own_stages(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, bool]]:
    stack = model.vision_tower if isinstance(model, SiglipModel) else model.language_model
    return _stages(
        getattr(model, "vision_tower", None), getattr(model, "multi_modal_projector", None), stack
    )


def _compare(
    model: PreTrainedModel, samples: list[Sample], expected: dict[str, _Expected], measure: Measure
) -> list[Check]:
    """Our stages against the expected outputs."""
    errors = _Errors({stage: found.values for stage, found in expected.items()}, measure)
    for sample in samples:
        _watch(model, _own_stages(model), sample, errors.add)
    return [Check(stage, errors.total(stage), found.allowed) for stage, found in expected.items()]


def _stages(
    encoder: nn.Module | None, projector: nn.Module | None, stack: nn.Module
) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, True to compare its output, False its input), for the parts that both models
    have.
    """
    if encoder is not None:
        yield "patches", _find(encoder, "patch_embedding"), True
    if projector is not None:
        yield "vision encoder", projector, False
        yield "projector", projector, True
    layers = _find(stack, "layers")
    yield "embeddings", layers[0], False
    for number, layer in enumerate(layers):
        yield f"layer {number}", layer, True


def _find(module: nn.Module, name: str) -> nn.Module:
    return next(found for path, found in module.named_modules() if path.split(".")[-1] == name)


def _watch(
    model: PreTrainedModel, stages, sample: Sample, tell: Callable[[str, torch.Tensor], None]
) -> None:
    """Run a model and report the value of each stage and of the output."""

    def after(stage: str, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if (
            value.dim() == 4 and stage == "patches"
        ):  # a convolution's [images, width, rows, columns]
            value = value.flatten(2).transpose(1, 2)
        tell(stage, _on_cpu(value))

    def before(stage: str, args: tuple, kwargs: dict) -> None:
        tell(stage, _on_cpu(args[0] if args else kwargs["hidden_states"]))

    hooks = []
    for stage, module, out in stages:
        if out:
            hooks.append(
                module.register_forward_hook(
                    lambda module, args, output, stage=stage: after(stage, output)
                )
            )
        else:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, stage=stage: before(stage, args, kwargs),
                    with_kwargs=True,
                )
            )
    try:
        output = model(**sample.inputs, **({"use_cache": False} if sample.length else {}))
    finally:
        for hook in hooks:
            hook.remove()
    for stage in ("logits", "last_hidden_state", "pooler_output"):
        if (value := getattr(output, stage, None)) is not None:
            tell(stage.replace("_", " "), _on_cpu(value))


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)


def _cached(model: PreTrainedModel, sample: Sample, measure: Measure) -> float:
    """The last tokens one by one with a cache, against one run over all tokens."""
    plain = model(**sample.inputs, use_cache=False).logits
    first = model(**sample.cut(0, sample.prompt), use_cache=True)
    logits, cache = [first.logits], first.cache
    for token in range(sample.prompt, sample.length):
        logits.append(model(**sample.cut(token, token + 1), cache=cache, use_cache=True).logits)
    return measure.difference(_on_cpu(torch.cat(logits, 1)), _on_cpu(plain))


def _batched(model: PreTrainedModel, samples: list[Sample], measure: Measure) -> float:
    """Rows of unequal lengths, padded on the left, against each row alone."""
    together = model(**Sample.join(samples), use_cache=False).logits
    return max(
        measure.difference(
            _on_cpu(logits[-sample.length :]),
            _on_cpu(model(**sample.inputs, use_cache=False).logits[0, -sample.length :]),
        )
        for logits, sample in zip(together, samples, strict=True)
    )
