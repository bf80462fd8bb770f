"""A user's script for type checkers to read; it never runs. A wrong call that they let pass is an
ignore comment they call unused.
"""

from typing import Any, assert_type

import torch
from torch import nn
from transformers.generation.utils import GenerateOutput

import mllama
from mllama import MllamaForConditionalGeneration, SiglipModel, ops
from mllama.hf.compat import DecoderOutput
from mllama.hf.outputs import MllamaOutput


def loading() -> None:
    assert_type(mllama.load(), tuple[MllamaForConditionalGeneration | Any, Any])
    assert_type(
        MllamaForConditionalGeneration.from_pretrained("folder", dtype=torch.bfloat16),
        MllamaForConditionalGeneration,
    )
    assert_type(SiglipModel.from_pretrained("folder"), SiglipModel)
    assert_type(mllama.TiledProcessor.from_pretrained("folder"), mllama.TiledProcessor)
    assert_type(mllama.MllamaImageProcessor.from_pretrained("folder"), mllama.MllamaImageProcessor)
    assert_type(mllama.load_hf_model("folder")[0], MllamaForConditionalGeneration | Any)
    mllama.lode()  # type: ignore[attr-defined]
    mllama.load(device=0)  # type: ignore[arg-type]
    MllamaForConditionalGeneration.from_pretrained("folder", subfolder=1)  # type: ignore[arg-type]


def answering(model: MllamaForConditionalGeneration, processor: Any) -> None:
    assert_type(mllama.ask("image.png", "How many?", model, processor, temperature=0.5), str)
    inputs = processor(["How many?"], ["image.png"])
    assert_type(model.generate(inputs["input_ids"], max_new_tokens=5), torch.LongTensor)
    assert_type(model.generate(inputs["input_ids"], return_dict_in_generate=True), GenerateOutput)
    assert_type(model.forward(inputs["input_ids"]), MllamaOutput | DecoderOutput | tuple[Any, ...])
    assert_type(mllama.ask("image.png", ["How many?", "What color?"]), list[str])
    mllama.ask("How many?")  # type: ignore[call-overload]
    mllama.ask("image.png", 3)  # type: ignore[call-overload]
    model.forward("How many?")  # type: ignore[arg-type]


def adapting(model: MllamaForConditionalGeneration, siglip: SiglipModel) -> None:
    assert_type(
        mllama.convert_linears_to_lora(model.language_model, rank=8, alpha=16),
        dict[str, mllama.Linear_LORA],
    )
    assert_type(mllama.lora_parameters(model), list[nn.Parameter])
    assert_type(mllama.convert_to_lora(model, ["q_proj"], 8, 16), MllamaForConditionalGeneration)
    assert_type(mllama.merge_and_unload(model), MllamaForConditionalGeneration)
    assert_type(
        mllama.fuse(model, siglip, fusion="prepend", num_image_tokens=4),
        MllamaForConditionalGeneration,
    )
    assert_type(mllama.check_labels(model, {"input_ids": torch.zeros(1, 1)}).passed, bool)
    assert_type(mllama.check_gradients(model, {}).message, str)
    assert_type(str(mllama.check_frozen(model, {})), str)
    mllama.check_overfit(model, {}, steps="many")  # type: ignore[arg-type]
    mllama.save_lora("adapters.safetensors", model)  # type: ignore[arg-type]
    mllama.convert_linears_to_lora(model, rank="8")  # type: ignore[arg-type]
    mllama.fuse(siglip, model)  # type: ignore[arg-type]


def packing(model: MllamaForConditionalGeneration, ids: torch.Tensor) -> None:
    assert_type(mllama.optimize(model, "int4", calibration=ids), MllamaForConditionalGeneration)
    assert_type(mllama.quantize("folder", "packed", "int8", text="text.txt"), dict[str, Any])
    mllama.optimize(model, 4)  # type: ignore[arg-type]
    mllama.quantize("folder")  # type: ignore[call-arg]


def operating(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert_type(ops.rms_norm(x, weight), torch.Tensor)
    assert_type(ops.add_rms_norm(x, x, weight), tuple[torch.Tensor, torch.Tensor])
    assert_type(mllama.ops.attention(x, x, x, causal=True, query_offset=3), torch.Tensor)
    ops.rms_norm(x)  # type: ignore[call-arg]
    ops.attention(x, x, x, causal="yes")  # type: ignore[arg-type]
    ops.layernorm(x, weight)  # type: ignore[attr-defined]
