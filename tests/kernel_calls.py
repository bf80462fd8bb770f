"""A few small calls of each operator that has a CUDA kernel: for tests in which every launch costs
much, or in which it matters how a kernel is launched and not with what. `tests/ops` has all sizes
and options.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from helpers import Sample
from mllama import ops
from mllama.ops.cross_entropy import cross_entropy_
from mllama.ops.packed_layout import pack

torch.manual_seed(0)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class KernelCall:
    """A public function of `mllama.ops` with arguments on the CPU.

    Attributes:
        call: the function.
        sample: its arguments, float tensors in float32.
        keep: places and names of arguments that stay float32 beside 16-bit ones.
        differentiable: those that have gradients.
        capturable: a CUDA graph can record it: it neither waits for the device nor copies from the
            host.
    """

    call: Callable
    sample: Sample
    keep: Sequence[int | str] = ()
    differentiable: Sequence[int | str] = ()
    capturable: bool = True

    def typed(self, dtype: torch.dtype) -> Sample:
        """The arguments in a dtype."""
        return self.sample.map(lambda value: value.to(dtype), keep=self.keep)

    def results(self, sample: Sample) -> list[torch.Tensor]:
        """What it returns for a sample of these arguments, then gradients of the sum of sines."""
        leaves = sample.map(lambda value: value.detach().requires_grad_(), only=self.differentiable)
        found = self.call(*leaves.args, **leaves.kwargs)
        results = list(found) if isinstance(found, tuple) else [found]
        if self.differentiable:
            loss = sum(result.float().sin().sum() for result in results)
            results += torch.autograd.grad(loss, leaves.leaves())
        return [result.detach() for result in results]


def _numbers(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cpu") for shape in shapes]


def _attention(batch, queries, keys, heads, kv_heads, size, **options) -> KernelCall:
    shapes = ((batch, queries, heads, size), *2 * [(batch, keys, kv_heads, size)])
    return KernelCall(ops.attention, Sample(tuple(_numbers(*shapes)), options), (), (0, 1, 2))


def _rope() -> KernelCall:
    q, k, cos, sin = _numbers((2, 5, 3, 34), (2, 5, 1, 34), (1, 5, 17), (1, 5, 17))
    return KernelCall(ops.rope, Sample((q, k, cos, sin)), (2, 3), (0, 1))


def _lora(**options) -> KernelCall:
    x, weight, a, b, bias = _numbers((3, 7, 72), (40, 72), (5, 72), (40, 5), (40,))
    arguments = Sample((x, weight / 8, a / 8, b, bias), options)
    return KernelCall(ops.lora_linear, arguments, (2, 3), (0, 2, 3, 4))


def _lora_group(dropout: float) -> KernelCall:
    x, *layers = _numbers((40, 72), (40, 72), (5, 72), (40, 5), (24, 72), (3, 72), (24, 3))

    def call(x, seeds, *layers):
        made = [ops.LoraLayer(*layers[i : i + 3], None, 0.5, dropout) for i in (0, 3)]
        return tuple(ops.lora_linears(x, made, seeds))

    seeds, layers = torch.tensor([3, 4], device="cpu"), [tensor / 8 for tensor in layers]
    return KernelCall(call, Sample((x, seeds, *layers)), (3, 4, 6, 7), (0, 3, 4, 6, 7))


def _packed(packing: str, rows: int) -> KernelCall:
    x, weight, bias = _numbers((rows, 100), (37, 100), (37,))
    arguments = x, pack(weight / 10, packing), bias
    options = {"out_features": 37, "packing": packing, "activation": "gelu"}
    return KernelCall(ops.packed_linear, Sample(arguments, options), (2,))


def _dequantized(packing: str) -> KernelCall:
    x, weight, bias = _numbers((7, 100), (37, 100), (37,))
    arguments = x, pack(weight / 10, packing), bias
    options = {"out_features": 37, "packing": packing}
    return KernelCall(ops.dequantized_linear, Sample(arguments, options), (2,), (0, 2))


def _unpack(packing: str) -> KernelCall:
    packed, rows = pack(_numbers((37, 100))[0], packing), torch.tensor([3, 36, 0], device="cpu")
    return KernelCall(ops.unpack_weight, Sample((packed, 37, 100, packing), {"rows": rows}))


def _there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = ops.quantize_rows(x)
    return codes, ops.dequantize_rows(codes, x.shape[-1], x.dtype)


def _select(**options) -> KernelCall:
    (logits,) = _numbers((3, 501))
    uniform = torch.rand(3, dtype=torch.float64, device="cpu")
    arguments = {"uniform": uniform, "present": logits > 1} | options
    return KernelCall(
        ops.select_token, Sample((logits,), arguments), ("uniform",), capturable=False
    )


def _image() -> KernelCall:
    image = torch.randint(0, 256, (37, 51, 3), dtype=torch.uint8, device="cpu")
    (table,) = _numbers((256, 3))
    return KernelCall(ops.resize_normalize, Sample((image, 20, 60, table)), (3,), capturable=False)


def _entropy() -> KernelCall:
    (scores,), targets = _numbers((5, 515)), torch.tensor([3, -1, 514, 515, 0], device="cpu")
    return KernelCall(_losses, Sample((scores, targets)))


def _losses(scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With the gradient, which takes the scores' place."""
    slopes = scores.clone()
    return cross_entropy_(slopes, targets, 4.0, 1.0), slopes


def _make() -> dict[str, list[KernelCall]]:
    """Calls by the operator's file in csrc/ops."""
    norm = Sample(tuple(_numbers((5, 77), (77,))), {"eps": 1e-5})
    add = Sample(tuple(_numbers((5, 77), (5, 77), (77,))))
    shifted = Sample(tuple(_numbers((5, 77), (77,), (77,))))
    gated = Sample(tuple(_numbers((5, 77), (5, 77))))
    patches = Sample(tuple(_numbers((2, 3, 8, 12), (5, 3, 4, 4), (5,))))
    seed = {"scale": 2.0, "dropout": 0.3, "seed": torch.tensor([12345], device="cpu")}
    return {
        "rms_norm": [
            KernelCall(ops.rms_norm, norm, (1,), (0, 1)),
            KernelCall(ops.add_rms_norm, add, (2,), (0, 1, 2)),
        ],
        "layer_norm": [KernelCall(ops.layer_norm, shifted, (1, 2), (0, 1, 2))],
        "rope": [_rope()],
        "gated": [KernelCall(function, gated, (), (0, 1)) for function in (ops.swiglu, ops.geglu)],
        "patch_embed": [KernelCall(ops.patch_embed, patches, (1, 2), (0, 1, 2))],
        "lora_linear": [_lora(), _lora(**seed), _lora_group(0.0), _lora_group(0.25)],
        "image": [_image()],
        "quantized_rows": [KernelCall(_there_and_back, Sample(tuple(_numbers((3, 5, 40)))))],
        "select_token": [_select(top_k=40, top_p=0.9), _select(repetition_penalty=1.3)],
        "attention": [
            _attention(1, 37, 70, 2, 1, 64, causal=True, window=50),
            _attention(2, 2, 290, 4, 2, 40, softcap=3.0),
            _attention(1, 20, 40, 2, 2, 128, key_mask=torch.arange(40, device="cpu")[None] < 30),
        ],
        "cross_entropy": [_entropy()],
        "packed_linear": [
            *(_packed(packing, rows) for packing in ("int4", "int8", "bf16") for rows in (3, 70)),
            _unpack("int4"),
            _dequantized("int4"),
        ],
    }


CALLS = _make()
ALL_CALLS = {
    f"{name} {number}": call for name, calls in CALLS.items() for number, call in enumerate(calls)
}
