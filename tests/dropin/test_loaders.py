"""`utils.load_hf_model` and `Model.utils.load_hf_model` on folders that stock transformers and this
package wrote.
"""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file

import stock
import twins
from mllama import SiglipModel, load_hf_model
from mllama.dropin import utils
from mllama.dropin._cache import KVCache
from mllama.dropin.Model import utils as tolerant
from mllama.dropin.model import MllamaForConditionalGeneration
from mllama.dropin.modeling_gemma import GemmaForCausalLM, PaliGemmaForConditionalGeneration

LOADERS = {"strict": utils.load_hf_model, "tolerant": tolerant.load_hf_model}
CLASSES = {
    "llava, siglip": MllamaForConditionalGeneration,
    "mllama": MllamaForConditionalGeneration,
    "llama": MllamaForConditionalGeneration,
    "gemma": GemmaForCausalLM,
    "paligemma": PaliGemmaForConditionalGeneration,
}


@pytest.fixture
def broken(family_folder, tmp_path):
    """broken(edit): a copy of the SigLIP + Llama folder whose tensors were changed."""

    def make(edit):
        for file in family_folder("llava, siglip").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path)

    return make


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("family", CLASSES)
def test_classes_that_take_a_kv_cache(family, load, family_folder, capsys):
    model, tokenizer = load(str(family_folder(family)), "cpu")
    assert (
        type(model) is CLASSES[family] and not model.training and tokenizer.padding_side == "right"
    )
    cache, ids = KVCache(), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        output = model(input_ids=ids, kv_cache=cache)
        assert output["kv_cache"] is cache and cache.num_items() == 3
        token = output["logits"][:, -1:].argmax(-1)
        step = model(input_ids=token, attention_mask=torch.ones(1, 4), kv_cache=cache)["logits"]
        # a prompt of PaliGemma is seen both ways: what was said after it is not
        types = {"token_type_ids": torch.tensor([[0, 0, 0, 1]])} if family == "paligemma" else {}
        torch.testing.assert_close(
            step[:, -1],
            model(torch.cat([ids, token], 1), **types)["logits"][:, -1],
            rtol=1e-4,
            atol=1e-4,
        )
    said = capsys.readouterr().out
    assert "converted: " in said and "skipped" not in said and "missing" not in said


@pytest.mark.parametrize("family", CLASSES)
def test_they_generate_what_the_packages_do(family, family_folder):
    model, own = (
        utils.load_hf_model(family_folder(family))[0],
        load_hf_model(family_folder(family))[0],
    )
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if family == "mllama":
        ratio, pixels = torch.ones(1, 1, dtype=torch.long), torch.randn(1, 1, 4, 3, 16, 16)
        inputs |= {
            "pixel_values": pixels,
            "aspect_ratio_ids": ratio,
            "cross_attention_mask": torch.ones(1, 4, 1, 4),
        }
    elif model.spec.fusion:
        ids = torch.tensor([[model.image_token_index] * twins.PATCHES + [5, 6]])
        inputs = {"input_ids": ids, "pixel_values": twins.pictures(1)}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **options), own.generate(**inputs, **options))


def test_a_siglip_alone(tmp_path, make_tokenizer):
    stock.make("siglip").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert type(utils.load_hf_model(tmp_path)[0]) is SiglipModel


def test_leftovers(broken, capsys):
    def edit(tensors):
        tensors["surprise"] = torch.zeros(1)
        del tensors["language_model.model.norm.weight"]

    path = broken(edit)
    with pytest.raises(
        ValueError, match="missing .1.: language_model.model.norm.weight; unexpected .1.: surprise"
    ):
        utils.load_hf_model(path, "cpu")
    assert "converted" not in capsys.readouterr().out
    model, _ = tolerant.load_hf_model(path, "cpu")
    assert bool((model.language_model.norm.weight == 1).all())
    said = capsys.readouterr().out
    assert (
        "skipped, of unknown names (1): surprise" in said
        and "initialised afresh (1): language_model.norm.weight" in said
    )


def test_a_head_that_is_not_there_is_tied(broken, capsys):
    path = broken(lambda tensors: tensors.pop("language_model.lm_head.weight"))
    with pytest.raises(ValueError, match="missing .1.: language_model.lm_head.weight"):
        utils.load_hf_model(path, "cpu")
    model, _ = tolerant.load_hf_model(path, "cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "tied: lm_head.weight" in capsys.readouterr().out


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_no_model_there(load, tmp_path):
    assert list(inspect.signature(load).parameters) == ["model_path", "device"]
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "nothing"), "cpu")


def test_a_picture_of_a_loaded_folder(family_folder):
    folder = family_folder("llava, siglip")
    model, _ = utils.load_hf_model(folder, device="cpu")
    ids = torch.tensor([[model.image_token_index] * twins.PATCHES + [5, 6]])
    assert model(ids, twins.pictures(1))["logits"].shape[:2] == (1, 6)
