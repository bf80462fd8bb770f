"""Packing the linear layers of a model, all at once or one by one while it is loaded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from mllama import _ext
from mllama.nn.adapted import note_change
from mllama.nn.checks import check_integers
from mllama.nn.packed import PackedFormat, PackedLinear, packed_layer
from mllama.ops._dispatch import has_kernel
from mllama.ops.packed_gguf import GGUF_BLOCKS, pack_gguf
from mllama.ops.packed_linear import pack_weight
from mllama.quant import gptq


@dataclass(frozen=True)
class Recipe:
    """Formats by part of a model; see `mllama.ops.pack_weight`.

    Attributes:
        decoder: linear layers of the decoder, cross-attention layers among them.
        tables: embeddings and the output head, whose errors show most.
        vision: linear layers of the vision encoder, pooling and the projector.
    """

    decoder: str
    tables: str
    vision: str


RECIPES = {
    "f32": Recipe("f32", "f32", "f32"),
    "bf16": Recipe("bf16", "bf16", "bf16"),
    "f16": Recipe("f16", "f16", "f16"),
    "int8": Recipe("int8", "int8", "int8"),
    "int4": Recipe("int4", "int8", "int8"),
}
# In place of a recipe: every layer in the format that holds what the file has for it, exactly.
FILE = "file"
# The same, but layers that the file has in float32 are packed in the model's dtype; for commands
# that only generate.
AUTO = "auto"
_OF_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# GGUF's blocks by the format that holds them; others are requantized.
_OF_BLOCKS = {"Q8_0": "int8"} | {name.upper(): name for name in GGUF_BLOCKS if name != "int8"}
_OTHER_BLOCKS = "int8"
_Model = TypeVar("_Model", bound=nn.Module)
HEAD, EMBEDDINGS = "lm_head", "language_model.embed_tokens"


class Packer:
    """Replaces layers of a model by packed ones.

    Args:
        model: a `VisionLanguageModel` or a SigLIP, which may be on the meta device.
        weights: one of RECIPES, or FILE or AUTO while a model is loaded.
        device: where the model will be. Weights are packed on the CPU.
        device_of: where each layer will be, by name. Default: all on `device`.

    Attributes:
        packed: the format of every layer packed so far, by name.

    Raises:
        ValueError: weights is not known; the model is none of this package's, has LoRA layers or is
            packed; there are no kernels for packed weights on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: str,
        device: Any = "cpu",
        device_of: Callable[[str], Any] | None = None,
    ):
        known = [FILE, AUTO, *RECIPES]
        if weights not in known:
            raise ValueError(f"weights must be one of {', '.join(known)}, got {weights!r}")
        check_packable(model, weights, device)
        self.model, self.weights, self.recipe = model, weights, RECIPES.get(weights)
        self._device_of = device_of or (lambda name: device)
        self.packed: dict[str, str] = {}
        self._tied = is_tied(model)
        self._left = {
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear or name == EMBEDDINGS
        }
        if self._tied:
            self._left.discard(HEAD)  # it gets the embeddings' matrix

    def take(
        self, name: str, read: Callable[..., torch.Tensor], header: Any, dtype: torch.dtype
    ) -> bool:
        """Pack a parameter, if it is one of a layer to pack.

        Args:
            name: the parameter's.
            read: reads its value, or the blocks that header names, as
                `mllama.checkpoints.sources.Reading` says.
            header: of the file's tensor (`mllama.checkpoints.sources.Header`), or None.
            dtype: of the model's other parameters.

        Returns:
            Whether it was: then the model has a packed layer in its place.
        """
        owner, _, last = name.rpartition(".")
        if self._tied and owner == HEAD:
            owner = EMBEDDINGS
        if last == "weight" and owner in self.packed:  # the other name of a tied matrix
            packed = self.model.get_submodule(owner).packed.cpu()
            check_tied(torch.equal(packed, _pack(read, header, self.packed[owner])))
            return True
        if last != "weight" or owner not in self._left:
            return False
        packing = self._choose(owner, header, dtype)
        self.put(owner, _pack(read, header, packing), packing, dtype)
        return True

    def put(self, owner: str, packed: torch.Tensor, packing: str, dtype: torch.dtype) -> None:
        """Replace a layer by one with a packed weight.

        Args:
            owner: the layer's name.
            packed: as `pack_weight` returns it.
            packing: its format.
            dtype: of the model's other parameters.
        """
        self._left.discard(owner)
        module: Any = self.model.get_submodule(owner)
        packed = packed.to(self._device_of(owner))
        self._put(owner, packed_layer(module, packed, packing, dtype))
        if self._tied and owner == EMBEDDINGS:
            self._put(HEAD, PackedLinear(packed, *reversed(module.weight.shape), packing))

    def lay_out(self, dtype: torch.dtype) -> None:
        """Put packed layers without values on the meta device, for a model that is there: what a
        recipe would make of it.

        Args:
            dtype: of the model's other parameters.

        Raises:
            ValueError: there is no recipe, but FILE or AUTO.
        """
        if self.recipe is None:
            raise ValueError(f"weights={self.weights!r} depends on files: it cannot be laid out")
        for owner in sorted(self._left):
            packing = self._choose(owner, None, dtype)
            shape = self.model.get_submodule(owner).weight.shape
            size = PackedFormat(packing, *shape).nbytes
            packed = torch.empty(size, dtype=torch.uint8, device="meta")
            self.put(owner, packed, packing, dtype)

    def calibrate(self, ids: torch.Tensor) -> None:
        """Pack the layers that get four bits for a text, as `pack_calibrated` does.

        Args:
            ids: int64 [rows, T].

        Raises:
            TypeError: ids is no int64 tensor.
            ValueError: there is no decoder, or no layer of it gets four bits; ids is not [rows, T]
                with tokens.
            IndexError: an id is not in the vocabulary.
        """
        if self.model.spec.text is None:
            raise ValueError("calibration is for decoders, and the model has none")
        if self.recipe is None or gptq.FORMAT not in (self.recipe.decoder, self.recipe.vision):
            raise ValueError(f"calibration is for weights='int4', got {self.weights!r}")
        check_integers("calibration", ids, [torch.int64])
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"calibration must be [rows, tokens], got {list(ids.shape)}")
        rows = self.model.get_submodule(EMBEDDINGS).weight.shape[0]
        if ids.min() < 0 or ids.max() >= rows:
            raise IndexError(f"calibration must have ids of 0 to {rows - 1}")
        four_bits = [
            name
            for name in self._left
            if name.startswith("language_model.")
            and self._choose(name, None, torch.float32) == gptq.FORMAT
        ]
        gptq.pack_calibrated(self.model, four_bits, ids, self.put)

    def pack_all(self) -> None:
        """Pack the model's own parameters; each dense one is let go before the next is packed."""
        if self._tied:
            names = f"{HEAD}.weight", f"{EMBEDDINGS}.weight"
            check_tied(torch.equal(*map(self.model.get_parameter, names)))
        modules: list[tuple[str, Any]] = list(self.model.named_modules())
        for owner, module in modules:
            if owner in self._left:
                weight = module.weight
                try:
                    self.take(f"{owner}.weight", weight.detach, None, weight.dtype)
                except ValueError as error:
                    if self.packed:  # nothing else may take it for a dense model
                        mark_packed(self.model, "a part of its layers only")
                    raise ValueError(f"{owner}.weight: {error}") from error

    def finish(self) -> None:
        """Freeze what is left, once all is packed."""
        formats = Counter(self.packed.values())
        name = "+".join(one for one, _ in formats.most_common())
        mark_packed(self.model, name if self.recipe is None else self.weights)

    def _put(self, name: str, module: nn.Module) -> None:
        self.model.set_submodule(name, module)
        self.packed[name] = module.packing

    def _choose(self, name: str, header: Any, dtype: torch.dtype) -> str:
        """The format of a layer in a model of a dtype."""
        if self.recipe is None:
            if header.blocks is None:
                wide = self.weights == AUTO and header.dtype not in (torch.bfloat16, torch.float16)
                return _OF_DTYPES.get(dtype if wide else header.dtype, "f32")
            return _OF_BLOCKS.get(header.blocks, _OTHER_BLOCKS)
        if name in (HEAD, EMBEDDINGS):
            return self.recipe.tables
        return self.recipe.decoder if name.startswith("language_model.") else self.recipe.vision


def _pack(read: Callable[..., torch.Tensor], header: Any, packing: str) -> torch.Tensor:
    """A weight in a format, from the file's own blocks where they are of that format."""
    if header is not None and _OF_BLOCKS.get(header.blocks) == packing:
        return pack_gguf(read(blocks=True), packing)
    return pack_weight(read().cpu(), packing)


def check_packable(model: nn.Module, weights: str, device: Any) -> None:
    """Raise ValueError as `Packer` does."""
    if _ext.disabled():
        raise ValueError("weights needs the compiled operators, which are disabled here")
    if not _has_kernels(device):
        raise ValueError(
            f"weights={weights!r} needs one device: the CPU, or CUDA's if this build has kernels "
            f"for it; got {str(device)!r}"
        )
    if not hasattr(model, "spec"):
        raise ValueError(
            f"weights are packed of this package's models; {type(model).__name__} is none"
        )
    if packing_of(model) is not None:
        raise ValueError("weights cannot be packed twice: this model is packed")
    if any(".lora_a" in name or ".lora_A" in name for name, _ in model.named_parameters()):
        raise ValueError("this model has LoRA layers: merge them before its weights are packed")


def _has_kernels(device: Any) -> bool:
    try:
        return has_kernel("packed_linear", torch.device(device))
    except (RuntimeError, TypeError):  # a map, or the name of a way to make one
        return False


def check_tied(equal: bool) -> None:
    """Raise ValueError unless the head's matrix and the embeddings' are equal."""
    if not equal:
        raise ValueError(
            f"{HEAD}.weight and {EMBEDDINGS}.weight differ, but the config says they are one (tied)"
        )


def mark_packed(model: nn.Module, weights: str) -> None:
    """Freeze a model whose layers are packed, and note how."""
    model.requires_grad_(False)
    model.__dict__["packed_weights"] = weights


def packing_of(model: nn.Module) -> str | None:
    """Which of RECIPES a model's weights are packed by, or the formats that its file gave, as in
    "q4_1+int8"; None where they are not packed.
    """
    return getattr(model, "packed_weights", None)


def is_tied(model: nn.Module) -> bool:
    """Whether the model has an output head that is its embeddings' matrix."""
    text = model.spec.text
    return text is not None and text.tie_word_embeddings


def tie_packed(model: nn.Module) -> None:
    """Let a packed model's head share the packed embeddings, where its config ties them."""
    if is_tied(model):
        model.get_submodule(HEAD).packed = model.get_submodule(EMBEDDINGS).packed


def choose_weights(
    weights: str | None, packed_as: str | None, device: torch.device, adapted: bool
) -> str | None:
    """Resolve AUTO and "none" for files whose weights are packed as `packed_as`, or are not.

    AUTO stays on the CPU where a model can be packed, and is None on other devices, without the
    compiled operators, or with adapters. Any other value is returned unchanged.

    Raises:
        ValueError: "none" for packed weights.
    """
    if weights == "none" and packed_as is not None:
        raise ValueError(f"weights must not be 'none': the files' are packed as {packed_as}")
    if weights == "none":
        return None
    if weights != AUTO:
        return weights
    return None if device.type != "cpu" or _ext.disabled() or adapted else AUTO


def optimize(model: _Model, weights: str, calibration: torch.Tensor | None = None) -> _Model:
    """Pack a model's linear layers, embeddings and output head: generation then reads fewer bytes
    per token, and runs all layers in one operator call. The weights are frozen; adapters can be
    trained beside them.

    Args:
        model: `MllamaForConditionalGeneration`, `SiglipModel`, or a core `VisionLanguageModel`,
            with its weights. It is changed in place; its other parameters need no gradient
            afterwards.
        weights: "bf16", "f16" or "f32" keep 16 or 32 bits; "int8" takes 8 with a scale for 32
            weights; "int4" takes 4 with a scale and a minimum for 32 weights, and 8 for embeddings,
            head, vision encoder and projector.
        calibration: int64 [rows, T], token ids of a text of a few thousand tokens, for "int4": the
            decoder's codes are chosen for the inputs that its layers get from it, by GPTQ
            (arXiv:2210.17323), which lowers the error of other texts too.

    Returns:
        The model, in eval mode.

    Raises:
        TypeError: calibration is no int64 tensor.
        IndexError: calibration has an id beyond the vocabulary.
        ValueError: calibration is for other weights than "int4", for a model without a decoder, or
            not [rows, T]; weights is not known; the model is packed or has LoRA layers, or is on a
            device for which this build has no kernels; a weight has values that the format cannot
            hold; the model is then packed in part, and has to be loaded anew.
    """
    if weights in (FILE, AUTO):
        raise ValueError(f"weights={weights!r} is for a model that is being loaded")
    device = next(model.parameters()).device
    # Each layer stays where it is: some may be on the host.
    packer = Packer(model, weights, device, lambda name: model.get_submodule(name).weight.device)
    if calibration is not None:
        packer.calibrate(calibration)
    packer.pack_all()
    packer.finish()
    note_change()  # sessions of the model begin anew
    return model.eval()
