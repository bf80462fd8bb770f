"""Folders of packed weights: written and read back bit for bit, by mapping; broken ones refused."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mllama
from helpers import needs_kernels
from mllama import MllamaForConditionalGeneration, optimize
from mllama.nn.packed import PackedLinear
from mllama.quant.packer import FILE, RECIPES
from tiny import folders, pairs

pytestmark = needs_kernels
WEIGHTS, INDEX = "packed.safetensors", "packed.safetensors.index.json"
LAYER = "language_model.layers.0.mlp.down_proj"


def load(folder, **options) -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration.from_pretrained(folder, **options)


def packed(case: str, weights: str = "int4") -> MllamaForConditionalGeneration:
    return optimize(copy.deepcopy(pairs.pair(case).ours), weights)


def assert_equal(model, other) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "llama"
    model, processor = mllama.load(folders.write("llama", folder.parent / "dense"), weights="int4")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(written, tmp_path):
    return shutil.copytree(written, tmp_path / "broken")


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("case", ["gemma3_text", "llava, clip, -2", "paligemma", "mllama"])
def test_round_trip(case, shard, tmp_path):
    model = packed(case)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    assert (tmp_path / "a" / (INDEX if shard == "20KB" else WEIGHTS)).exists()
    options = {"reference": "hf"} if case == "mllama" else {}
    loaded = load(tmp_path / "a", **options)
    assert loaded.packed_weights == "int4" and not loaded.training
    assert_equal(loaded, model)
    inputs = pairs.pair(case).inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "b", max_shard_size=shard)
    for file in (tmp_path / "a").glob("packed*"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("weights", [*RECIPES, FILE])
def test_every_recipe(weights, tmp_path):
    folders.write("llama", tmp_path / "dense")
    model = load(tmp_path / "dense", weights=weights)
    model.save_pretrained(tmp_path / "packed")
    assert_equal(load(tmp_path / "packed", weights=weights), model)
    with pytest.raises(ValueError, match="weights"):
        load(tmp_path / "packed", weights="int8" if weights != "int8" else "int4")


def test_the_weights_are_the_files_pages(written):
    """Aligned for the kernels; tied ones once."""
    model = load(written)
    lines = Path("/proc/self/maps").read_text().splitlines()
    pages = [line.split()[0] for line in lines if line.endswith(WEIGHTS)]
    spans = [[int(end, 16) for end in span.split("-")] for span in pages]
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    for address in [layer.packed.data_ptr() for layer in layers]:
        assert any(start <= address < end for start, end in spans) and address % 32 == 0
    assert model.lm_head.packed is model.get_input_embeddings().packed
    assert "lm_head.packed" not in load_file(written / WEIGHTS)
    before = (written / WEIGHTS).read_bytes()
    layers[0].packed.zero_()
    assert (written / WEIGHTS).read_bytes() == before


def test_every_door_opens_it(written):
    for weights in (None, "file", "int4"):
        model, processor = mllama.load(written, weights=weights)
        assert model.packed_weights == "int4"
    assert mllama.ask(None, "a b", model, processor, max_new_tokens=2) is not None
    assert mllama.load(written, dtype="bfloat16")[0].get_input_embeddings().dtype == torch.bfloat16
    config = type(model.config).from_pretrained(written)  # has the field that says how it is packed
    assert_equal(load(written, config=config), model)


def test_stock_transformers_does_not_read_it(written):
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(written)


def test_dense_and_packed_weights_replace_each_other(tmp_path):
    dense = pairs.pair("llama").ours
    for _ in range(2):
        dense.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("packed*"))
        assert load(tmp_path).dtype == dense.dtype
        packed("llama").save_pretrained(tmp_path, max_shard_size="20KB")
        assert not list(tmp_path.glob("model*"))
        assert load(tmp_path).packed_weights == "int4"


def test_what_it_does_not_take(written, tmp_path):
    with pytest.raises(ValueError, match="device"):
        load(written, device_map="meta")
    with pytest.raises(ValueError, match="adapter"):
        mllama.load(written, adapter=tmp_path)
    model = load(written)
    with pytest.raises(ValueError, match="state_dict"):
        model.save_pretrained(tmp_path / "no", state_dict={"lm_head.packed": model.lm_head.packed})
    other = optimize(load(written.parent / "dense"), "int8").state_dict()
    with pytest.raises(ValueError, match="state_dict"):
        model.save_pretrained(tmp_path / "no", state_dict=other)
    assert not (tmp_path / "no").exists()


def change_config(folder, **fields) -> None:
    folders.change(folder, lambda content: content["quantization_config"].update(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"version": None},
        {"weights": 4},
        {"weights": "int3"},
        {"weights": ""},
        {"weights": "int8"},
        {"version": True},
    ],
)
def test_a_config_of_another_kind(broken, fields):
    change_config(broken, **fields)
    with pytest.raises(ValueError):
        load(broken)


def test_weights_of_a_packed_folder(written):
    for weights in (None, "auto", "file", "int4"):
        model, _ = mllama.load(written, weights=weights)
        assert isinstance(model.get_submodule(LAYER), PackedLinear)
    for weights in ("none", "int8", "f32"):
        with pytest.raises(ValueError, match="weights"):
            mllama.load(written, weights=weights)


def test_a_config_of_another_library(broken):
    change_config(broken, quant_method="gptq")
    with pytest.raises((ValueError, FileNotFoundError)):
        load(broken)


def text(written: str) -> torch.Tensor:
    return torch.tensor(list(written.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("last", "value"),
    [
        ("packed", None),
        ("packed", torch.zeros(7, dtype=torch.uint8)),
        ("packed", torch.zeros(64, 96)),
        ("packed", torch.zeros(0, dtype=torch.uint8)),
        ("format", None),
        ("format", text("int3 64x96")),
        ("format", text("int4 96x64")),
        ("format", text("int8 64x96")),
        ("format", text("int4 64x-96")),
        ("format", text("int4 640000000x960000000")),
        ("format", text("int4 " + "6" * 400 + "x96")),
        ("format", torch.tensor([255, 0, 200], dtype=torch.uint8)),
        ("format", torch.zeros(0, dtype=torch.uint8)),
        ("format", torch.tensor(3.0)),
        ("weight", torch.zeros(64, 96)),
    ],
)
def test_broken_files(broken, last, value):
    tensors = load_file(broken / WEIGHTS)
    tensors.pop(f"{LAYER}.{last}", None)
    if value is not None:
        tensors[f"{LAYER}.{last}"] = value
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"mlp\.down_proj"):
        load(broken)


def test_a_head_that_is_not_the_embeddings(broken):
    tensors = load_file(broken / WEIGHTS)
    for last in ("packed", "format"):
        tensors[f"lm_head.{last}"] = tensors[f"language_model.embed_tokens.{last}"].clone()
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    load(broken)
    tensors["lm_head.packed"][3] += 1
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="tied"):
        load(broken)


def test_weights_at_odd_addresses(written):
    """Kernels read weights from any address."""
    model = load(written)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            memory = torch.zeros(layer.packed.numel() + 1, dtype=torch.uint8)
            memory[1:] = layer.packed
            layer.packed = memory[1:]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, load(written)(input_ids=ids).logits)


def test_a_state_says_its_format():
    model, other = packed("llama", "bf16"), packed("llama", "f16")
    before = copy.deepcopy(model.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="f16 64x64 in the state, and bf16 64x64"):
            model.load_state_dict(other.state_dict(), strict=strict)
    assert torch.equal(model.lm_head.packed, before["lm_head.packed"])
    layer, other = (
        PackedLinear(torch.zeros(2048, dtype=torch.uint8), columns, 32, "f16")
        for columns in (32, 31)
    )
    with pytest.raises(RuntimeError, match="f16 32x31"):
        layer.load_state_dict(other.state_dict())
    state = layer.state_dict()
    del state["format"]
    with pytest.raises(RuntimeError, match="format"):
        layer.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"weight": torch.zeros(32, 32)})


def test_what_torch_and_transformers_do_to_models():
    model = packed("gemma")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for other in (model.bfloat16(), model.half(), model.to(torch.float32)):
            assert other(input_ids=ids).logits.dtype == other.dtype
        assert copy.deepcopy(model).to("meta")(input_ids=ids.to("meta")).logits.is_meta
    empty = copy.deepcopy(model).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    empty.tie_weights()
    assert empty.lm_head.packed is empty.get_input_embeddings().packed
    with torch.no_grad():
        assert torch.equal(empty(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="packed"):
        model.init_weights()


def test_the_config_names_the_recipe(written):
    content = json.loads((written / "config.json").read_text())
    assert content["quantization_config"] == {
        "quant_method": "mllama",
        "version": 1,
        "weights": "int4",
    }
