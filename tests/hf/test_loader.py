"""The loader that older scripts call: what it prints, what it forgives, and what it refuses when
told to be strict.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllama import MllamaForConditionalGeneration, SiglipModel, load_hf_model
from tiny import stock


@pytest.fixture
def folder(tmp_path, make_tokenizer):
    """make(case): a folder that stock transformers wrote, with a tokenizer."""

    def make(case):
        stock.make(case).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    return make


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("strict", [False, True])
def test_a_whole_model_and_its_tokenizer(strict, folder, capsys):
    path = folder("llama, factor 32, tied, older spelling")
    model, tokenizer = load_hf_model(str(path), "cpu", strict=strict)
    assert tokenizer("hello").input_ids and not model.training
    same = MllamaForConditionalGeneration.from_pretrained(path).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    said = capsys.readouterr().out
    assert f"converted: {len(same) - 1} tensors of {path} (llama), float32" in said
    assert "tied: lm_head.weight is language_model.embed_tokens.weight" in said
    assert "missing" not in said and "skipped" not in said


def test_leftovers_are_skipped_and_what_is_missing_is_initialized(folder, capsys):
    path = folder("mllama")
    expected = MllamaForConditionalGeneration.from_pretrained(path).state_dict()

    def edit(tensors):
        del tensors["language_model.model.norm.weight"], tensors["vision_model.class_embedding"]
        del tensors["multi_modal_projector.bias"]  # beside a weight that is there
        tensors["language_model.lm_head.weight"] = torch.zeros(3, 64)
        tensors["surprise"] = torch.zeros(1)

    change(path, edit)
    model, _ = load_hf_model(path, "cpu")
    fresh = {
        "language_model.norm.weight",
        "vision_tower.class_embedding",
        "multi_modal_projector.linear.bias",
        "lm_head.weight",
    }
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu" and value.isfinite().all()
        assert torch.equal(value, expected[name]) is (name not in fresh), name
    assert torch.equal(model.language_model.norm.weight, torch.ones(64))
    said = capsys.readouterr().out
    assert "skipped, of unknown names (1): surprise" in said
    assert (
        "skipped, of another shape or kind (1): language_model.lm_head.weight is float32 [3, 64]"
        in said
    )
    assert "missing, newly initialized (4)" in said and all(name in said for name in fresh)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="surprise"):
        load_hf_model(path, "cpu", strict=True)


def test_a_missing_embedding_of_a_tied_model(folder, capsys):
    path = folder("llama, factor 32, tied, older spelling")
    change(path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    model, _ = load_hf_model(path, "cpu")
    assert (
        model.lm_head.weight is model.get_input_embeddings().weight
        and not model.lm_head.weight.is_meta
    )
    assert "missing, newly initialized (2)" in capsys.readouterr().out


def test_a_head_that_the_files_lack_is_tied(folder, capsys):
    path = folder("llama")
    change(path, lambda tensors: tensors.pop("lm_head.weight"))
    model, _ = load_hf_model(path, "cpu")
    assert (
        model.lm_head.weight is model.get_input_embeddings().weight
        and not model.lm_head.weight.is_meta
    )
    said = capsys.readouterr().out
    assert (
        "tied: lm_head.weight is language_model.embed_tokens.weight" in said
        and "missing" not in said
    )
    with pytest.raises(ValueError, match="missing .1.: lm_head.weight"):
        load_hf_model(path, "cpu", strict=True)


def test_a_tied_models_head_alone_or_another_one(folder, capsys):
    path = folder("llama, factor 32, tied, older spelling")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    change(path, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    model, _ = load_hf_model(path, "cpu")
    assert (
        torch.equal(model.lm_head.weight, embedding)
        and model.lm_head.weight is model.get_input_embeddings().weight
    )
    said = capsys.readouterr().out
    assert (
        "converted: 20 tensors" in said
        and "(1): lm_head.weight and model.embed_tokens.weight differ, but the config says" in said
    )
    with pytest.raises(ValueError, match="differ, but the config says"):
        load_hf_model(path, "cpu", strict=True)
    change(path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    model, _ = load_hf_model(path, "cpu", strict=True)
    assert (
        torch.equal(model.get_input_embeddings().weight, embedding + 1)
        and "missing" not in capsys.readouterr().out
    )


def test_a_siglip_alone(folder):
    assert type(load_hf_model(folder("siglip"), "cpu")[0]) is SiglipModel


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    stock.make("llama").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: none of tokenizer.json"):
        load_hf_model(tmp_path)


def test_a_tokenizer_is_not_made_up(tmp_path):
    stock.make("gemma").save_pretrained(tmp_path)  # transformers has an empty one of its class
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_hf_model(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}']
)
def test_a_broken_tokenizer_is_a_value_error(content, folder):
    path = folder("llama")
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer"):
        load_hf_model(path)
