"""Types and devices that models are loaded to."""

import sys

import pytest
import torch

import tiny
from mllama import MllamaForConditionalGeneration
from tiny.folders import logits


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
    ],
)
def test_dtypes(asked, got, tmp_path):
    model = tiny.model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = MllamaForConditionalGeneration.from_pretrained(
        tmp_path, device_map={"": "cpu"}, **asked
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {got}
    assert loaded.config.dtype == got
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(got))
    assert logits(loaded).isfinite().all()


PARTS = (
    "vision_tower",
    "multi_modal_projector",
    "language_model.embed_tokens",
    "language_model",
    "lm_head",
)


def test_a_map_of_devices_goes_to_accelerate(saved):
    pytest.importorskip("accelerate")
    folder, model = saved
    loaded = MllamaForConditionalGeneration.from_pretrained(
        folder, device_map=dict.fromkeys(PARTS, "cpu")
    )
    assert loaded.hf_device_map == dict.fromkeys(PARTS, "cpu") and torch.equal(
        logits(loaded), logits(model)
    )


@pytest.mark.parametrize(
    "device_map", ["auto", "balanced", "sequential", {"": "cpu"}, torch.device("cpu"), None]
)
def test_one_device_needs_no_accelerate(device_map, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder, model = saved
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(folder, device_map=device_map)),
        logits(model),
    )
    with pytest.raises(ImportError, match="accelerate"):
        MllamaForConditionalGeneration.from_pretrained(
            folder, device_map=dict.fromkeys(PARTS, "cpu")
        )


def test_accelerates_plans_are_asked_for(saved, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    asked = []

    def infer(model, max_memory, dtype, no_split_module_classes):
        asked.append(no_split_module_classes)
        return dict.fromkeys(PARTS, "cpu")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerate, "infer_auto_device_map", infer)
    folder, model = saved
    for plan in ("auto", "balanced", "balanced_low_0", "sequential"):
        loaded = MllamaForConditionalGeneration.from_pretrained(folder, device_map=plan)
        assert loaded.hf_device_map == dict.fromkeys(PARTS, "cpu") and torch.equal(
            logits(loaded), logits(model)
        )
    assert len(asked) == 4 and "DecoderLayer" in asked[0]


@pytest.mark.parametrize("plan", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_accelerate_makes_a_map_of_what_there_is(plan, saved, monkeypatch):
    pytest.importorskip("accelerate")
    from accelerate.utils import modeling

    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # plans are made where there are devices to choose from
    monkeypatch.setattr(modeling, "get_max_memory", lambda max_memory=None: {"cpu": 2**34})
    folder, model = saved
    loaded = MllamaForConditionalGeneration.from_pretrained(folder, device_map=plan)
    assert loaded.hf_device_map == {"": "cpu"} and torch.equal(logits(loaded), logits(model))


def test_a_model_that_fits_nowhere_is_refused(saved, monkeypatch):
    pytest.importorskip("accelerate")
    from accelerate.utils import modeling

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(modeling, "get_max_memory", lambda max_memory=None: {"cpu": 1000})
    with pytest.raises(ValueError, match="disk"):
        MllamaForConditionalGeneration.from_pretrained(saved[0], device_map="sequential")


@pytest.mark.parametrize(
    "device", ["xpu", "hpu", "mps", "vulkan", {"vision_tower": "xla", "": "cpu"}]
)
def test_a_device_that_is_not_here_is_refused(device, saved):
    pytest.importorskip("accelerate")
    name = device if isinstance(device, str) else "xla"
    if getattr(torch, name, None) is not None and getattr(torch, name).is_available():
        pytest.skip(f"{name} is here")
    with pytest.raises(ValueError, match=f"device '{name}'"):
        MllamaForConditionalGeneration.from_pretrained(saved[0], device_map=device)
