"""Packed models against the dense ones that their weights stand for."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import mllama
import tiny
from helpers import needs_kernels
from mllama import MllamaForConditionalGeneration, SiglipModel, optimize
from mllama.cli._options import WEIGHTS
from mllama.model.fast_decoder import find_obstacle
from mllama.nn.packed import PackedEmbedding, PackedLinear
from mllama.quant.packer import AUTO, FILE, RECIPES
from mllama.runtime.session import Session
from tiny import folders, pairs

pytestmark = needs_kernels
# Of the logits' own size: what random weights of tiny models lose.
ERROR = {"f32": 1e-5, "bf16": 5e-2, "f16": 5e-3, "int8": 0.15, "int4": 0.8}


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("weights", RECIPES)
@pytest.mark.parametrize("case", ["llama", "gemma3_text", "llava, clip, -2", "paligemma", "mllama"])
def test_logits(case, weights):
    pair, model = pairs.pair(case), copy.deepcopy(pairs.pair(case).ours)
    inputs = pair.inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = optimize(model, weights)(**inputs).logits
    assert distance(logits, expected) <= ERROR[weights]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("weights", RECIPES)
def test_features(weights, tmp_path):
    """Of an image encoder alone, also from files: while they are loaded, and packed ones."""
    pair = pairs.pair("siglip_vision_model")
    pair.ours.save_pretrained(tmp_path / "dense")
    model = optimize(copy.deepcopy(pair.ours), weights)
    model.save_pretrained(tmp_path / "packed")
    loaded = (
        SiglipModel.from_pretrained(tmp_path / "dense", weights=weights),
        SiglipModel.from_pretrained(tmp_path / "packed"),
    )
    assert not any(type(part) is torch.nn.Linear for part in model.modules())
    pixels = pair.images(2)
    with torch.no_grad():
        expected, output = pair.ours(pixels), model(pixels)
        for name in ("last_hidden_state", "pooler_output"):
            assert distance(output[name], expected[name]) <= ERROR[weights]
            assert all(torch.equal(one(pixels)[name], output[name]) for one in loaded)


def test_a_packed_model_computes_with_what_it_holds():
    """Its dense weights in the dense model give its logits but for rounded activations."""
    pair = pairs.pair("llava, clip, -2")
    model, packed = copy.deepcopy(pair.ours), optimize(copy.deepcopy(pair.ours), "int4")
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            model.get_submodule(name).weight.data = module.dense()
    with torch.no_grad():
        ids = torch.arange(packed.spec.text.vocab_size)
        model.get_input_embeddings().weight.data = packed.get_input_embeddings()(ids)
        logits, expected = (one(**pair.inputs()).logits for one in (packed, model))
    assert distance(logits, expected) <= 0.1


def test_what_is_packed():
    model = optimize(copy.deepcopy(pairs.pair("mllama").ours), "int4")
    kinds = {
        name: module.packing
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedEmbedding))
    }
    assert {name for name, kind in kinds.items() if kind == "int4"} == {
        name for name in kinds if name.startswith("language_model.layers.")
    }
    assert kinds["lm_head"] == kinds["language_model.embed_tokens"] == "int8"
    assert any(name.startswith("vision_tower.") for name in kinds)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())


def test_tied_embeddings_are_packed_once():
    model = optimize(copy.deepcopy(pairs.pair("gemma").ours), "int8")
    assert model.spec.text.tie_word_embeddings
    assert model.lm_head.packed is model.get_input_embeddings().packed
    model.to("meta")
    assert model.lm_head.packed.is_meta
    assert model.lm_head.packed is model.get_input_embeddings().packed


@pytest.mark.parametrize("family", ["llama", "gemma", "paligemma", "mllama"])
def test_loading_packs_as_packing_after_loading(family, tmp_path):
    folder = folders.write(family, tmp_path)
    loaded = MllamaForConditionalGeneration.from_pretrained(folder, weights="int4")
    packed = optimize(MllamaForConditionalGeneration.from_pretrained(folder), "int4")
    expected = packed.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert loaded.packed_weights == "int4" and not loaded.training


def test_load_and_the_command_line(tmp_path):
    folder = folders.write("llama", tmp_path)
    model, _ = mllama.load(folder, weights="int8")
    assert model.packed_weights == "int8"
    command = [sys.executable, "-m", "mllama", "generate", "--model", folder, "--prompt", "a b"]
    command += ["--weights", "int4", "--max-new-tokens", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["weights"] == "int4"
    assert "int4" in done.stderr
    assert set(WEIGHTS) == {"none", AUTO, FILE, *RECIPES}


def test_adapters_are_merged_before(tmp_path):
    folder = folders.write("llama", tmp_path / "model")
    model = MllamaForConditionalGeneration.from_pretrained(folder)
    mllama.convert_to_lora(model, rank=2, alpha=4, target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.1)
    mllama.save_lora(model, tmp_path / "adapter.safetensors")
    expected = optimize(mllama.merge_and_unload(model), "int8").state_dict()
    loaded, _ = mllama.load(folder, adapter=tmp_path / "adapter.safetensors", weights="int8")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_file_whose_tied_tensors_differ_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = folders.write("gemma", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights["lm_head.weight"] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="tied"):
        MllamaForConditionalGeneration.from_pretrained(folder, weights="int8")


def test_a_tied_file_with_the_head_alone(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = folders.write("gemma", tmp_path)
    expected = MllamaForConditionalGeneration.from_pretrained(folder, weights="int8").state_dict()
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights["lm_head.weight"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    loaded = MllamaForConditionalGeneration.from_pretrained(folder, weights="int8").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("value", ["int3", "", 4, True, FILE])
def test_formats_that_are_not_known(value):
    with pytest.raises(ValueError, match="weights"):
        optimize(copy.deepcopy(pairs.pair("llama").ours), value)


def test_what_a_packed_model_refuses():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "int4")
    with pytest.raises(ValueError, match="packed"):
        optimize(model, "int8")
    with pytest.raises(AttributeError, match="packed"):
        model.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="packed"):
        mllama.fuse(model, pairs.pair("siglip_vision_model").ours)
    with pytest.raises(ValueError, match="packed"):
        model.requires_grad_()


def test_models_that_cannot_be_packed():
    lora = copy.deepcopy(pairs.pair("llama").ours)
    mllama.convert_to_lora(lora, rank=2, alpha=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="LoRA"):
        optimize(lora, "int8")
    with pytest.raises(ValueError, match="Linear"):
        optimize(torch.nn.Linear(32, 32), "int8")
    too_large = tiny.model()
    too_large.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="lm_head.weight"):
        optimize(too_large, "int8")


def test_copies_and_pickles_of_packed_models(tmp_path):
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "int4")
    torch.save(model, tmp_path / "model.pt")
    inputs = pairs.pair("llama").inputs()
    with torch.no_grad():
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(other(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("blocks", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"])
def test_a_gguf_file_as_it_is(blocks, tmp_path):
    """Every weight is exactly the file's, in its own number of bits."""
    gguf = pytest.importorskip("gguf")
    from checkpoints.test_gguf import stock, write

    path = write(tmp_path / "m.gguf", stock(), getattr(gguf.GGMLQuantizationType, blocks))
    packing = {"Q8_0": "int8", "F16": "f16", "BF16": "bf16", "F32": "f32"}.get(
        blocks, blocks.lower()
    )
    assert formats_held_exactly(path) == {packing}


def test_int8_takes_blocks_of_8_bits_as_they_are(tmp_path):
    gguf = pytest.importorskip("gguf")
    from checkpoints.test_gguf import stock, write

    path = write(tmp_path / "m.gguf", stock(), gguf.GGMLQuantizationType.Q8_0)
    states = [
        MllamaForConditionalGeneration.from_pretrained(path, weights=weights).state_dict()
        for weights in ("int8", FILE)
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("sizes", "formats"),
    [
        ({"hidden_size": 256, "head_dim": 64}, {"q4_k", "q6_k"}),
        ({"hidden_size": 96, "head_dim": 32}, {"q5_0", "int8", "q4_k", "q6_k"}),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_a_gguf_file_of_mixed_blocks(architecture, sizes, formats, tmp_path, make_tokenizer):
    """As llama.cpp's Q4_K_M, and its fallbacks for rows that are no multiple of 256. It decodes by
    `decode_step`, and as the same weights packed by themselves.
    """
    pytest.importorskip("gguf")
    from checkpoints.test_gguf import own, stock
    from mllama.hf.gguf import save_gguf

    sizes = sizes | {"vocab_size": 330, "num_hidden_layers": 3, "intermediate_size": 512}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path / "m.gguf"
    save_gguf(own(stock(architecture, **sizes)), make_tokenizer(), path, "q4_k")
    assert formats_held_exactly(path) == formats
    model, processor = mllama.load(path, weights=FILE)
    assert find_obstacle(model.language_model) is None
    found = Session(model).generate({"input_ids": torch.arange(3, 9)[None]}, max_new_tokens=3)
    ids = found.completions[0].token_ids
    dense, _ = mllama.load(path)
    with torch.no_grad():
        states = torch.cat([torch.arange(3, 9), torch.tensor(ids)])[None]
        logits, expected = (one(input_ids=states).logits for one in (model, dense))
    assert distance(logits, expected) <= 0.1
    assert logits[0, 5:-1].argmax(-1).tolist() == ids


def formats_held_exactly(path) -> set[str]:
    """How the decoder's layers of a file are packed, once each is the dense model's."""
    model = MllamaForConditionalGeneration.from_pretrained(path, weights=FILE)
    dense = MllamaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and "layers" in name
    }
    for name, module in packed.items():
        assert torch.equal(module.dense(), dense.get_submodule(name).weight.float()), name
    return {module.packing for module in packed.values()}


def test_a_model_whose_tied_weights_differ_is_refused():
    model = copy.deepcopy(pairs.pair("gemma").ours)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match="tied"):
        optimize(model, "int8")


def test_a_model_that_is_packed_in_part_is_refused():
    model = tiny.model()
    with torch.no_grad():
        model.language_model.layers[-1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="down_proj"):
        optimize(model, "int8")
    with pytest.raises(ValueError, match="packed"):
        optimize(model, "int4")
