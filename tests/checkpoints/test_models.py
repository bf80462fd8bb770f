"""Models and their folders: what is saved loads equal, here and in stock transformers; what does
not fit is refused with every name.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import tiny
from mllama import MllamaConfig, MllamaForConditionalGeneration
from mllama.checkpoints.sources import SafetensorsSource
from tiny.folders import INPUTS, change, logits

OPTIONS = {
    "LLaVA": {},
    "LLaVA, tied": {"text": {"tie_word_embeddings": True}},
    "LLaVA, llama3 rope": {"text": {"rope_scaling": tiny.LLAMA3}},
    "last": {"vision_feature": "last"},
    "inner width": {"projection_dim": 24},
    "placeholder not known": {"image_token_index": None},
    "placeholder beyond the vocabulary": {"image_token_index": 200},
}


@pytest.mark.parametrize("shard", ["5GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_saved_loads_equal(case, shard, tmp_path):
    model = tiny.model(**OPTIONS[case])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.training
    for (name, value), (other, again) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(value, again)
    assert (
        loaded.lm_head.weight is loaded.get_input_embeddings().weight
    ) is loaded.config.tie_word_embeddings
    for name in ("text_config", "vision_config"):
        before, after = (
            getattr(config, name).to_dict() for config in (model.config, loaded.config)
        )
        assert {key: value for key, value in before.items() if key in after} == after
    for name in ("image_token_index", "ignore_index", "projection_dim", "vision_feature"):
        if hasattr(loaded.config, name):
            assert getattr(model.config, name) == getattr(loaded.config, name)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == (
        "llava" if case.startswith("LLaVA") else "siglip_llama"
    )
    assert (tmp_path / "model.safetensors").exists() is (shard == "5GB")


@pytest.mark.parametrize("case", [case for case in OPTIONS if case.startswith("LLaVA")])
def test_stock_transformers_reads_a_llava_folder(case, tmp_path):
    model = tiny.model(**OPTIONS[case])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    stock, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    expected = logits(model)
    assert (logits(stock) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_llava_folder_holds_the_names_that_older_readers_know(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (
        -1,
        "full",
    )
    assert config["text_config"]["rope_theta"] == 500000.0 and config["torch_dtype"] == "float32"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert metadata == {"format": "pt"} and len(names) == len(model.state_dict())
    assert {
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.post_layernorm.bias",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    } <= names


def test_a_tied_head_is_not_written(tmp_path):
    tiny.model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_what_stock_transformers_saves_is_read(tmp_path):
    model = tiny.model()
    tiny.twin(model).save_pretrained(tmp_path)
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(model)
    )


def test_the_encoders_pooling_head_is_read_past(saved):
    folder, model = saved
    tensors = load_file(folder / "model.safetensors") | {
        "vision_tower.vision_model.head.probe": torch.zeros(1, 1, 32)
    }
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(folder)), logits(model)
    )


def test_the_auto_class_knows_our_own_format(tmp_path):
    model = tiny.model(vision_feature="last")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is MllamaForConditionalGeneration and torch.equal(
        logits(loaded), logits(model)
    )


def test_the_config_of_either_format_is_read_alone(saved):
    folder, model = saved
    assert (
        MllamaConfig.from_pretrained(folder).text_config.to_dict()
        == model.config.text_config.to_dict()
    )


def test_the_generation_config_is_kept(saved):
    folder, model = saved
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    assert (
        MllamaForConditionalGeneration.from_pretrained(folder).generation_config.max_new_tokens == 7
    )


def test_a_generation_config_is_written_as_it_came(saved):
    """Released ones set temperature and top_p without do_sample, which transformers refuses to
    write, save of a config it has read.
    """
    folder, _ = saved
    change(
        folder, lambda content: content.update(temperature=0.9, top_p=0.6), "generation_config.json"
    )
    MllamaForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_config_given_stays_the_callers(saved):
    folder, _ = saved
    config = LlavaForConditionalGeneration.config_class.from_pretrained(folder)
    before = config.to_dict()
    for dtype in ("bfloat16", "float32"):
        model = MllamaForConditionalGeneration.from_pretrained(folder, config=config, dtype=dtype)
        assert model.config is not config and config.to_dict() == before


def test_a_loaded_model_is_trained_and_saved_again(saved, tmp_path):
    folder, _ = saved
    model = MllamaForConditionalGeneration.from_pretrained(folder).train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().save_pretrained(folder)  # over the files it was loaded from
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(folder)), logits(model)
    )


def test_a_loaded_model_does_not_hang_on_its_files(saved):
    folder, model = saved
    loaded = MllamaForConditionalGeneration.from_pretrained(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(0)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_weights_that_are_replaced_while_they_are_read_are_refused(shard, tmp_path, monkeypatch):
    tiny.model().save_pretrained(tmp_path, max_shard_size=shard)
    read, reads = SafetensorsSource.read, []

    def replace(source, name):
        reads.append(name)
        if len(reads) == 20:
            tiny.model(seed=1).save_pretrained(tmp_path, max_shard_size=shard)
        return read(source, name)

    monkeypatch.setattr(SafetensorsSource, "read", replace)
    with pytest.raises(ValueError, match="written anew while they were read: load them again"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path)
    MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_the_files_names_load_as_a_state_dict(saved):
    """Trainer resumes this way: all at once, or shard by shard with strict=False."""
    folder, model = saved
    tensors = load_file(folder / "model.safetensors")
    whole = tiny.model(seed=1)
    assert whole.load_state_dict(tensors) == ([], [])
    parts = tiny.model(seed=1)
    names = sorted(tensors)
    for part in (names[::2], names[1::2]):
        assert (
            parts.load_state_dict(
                {name: tensors[name] for name in part}, strict=False
            ).unexpected_keys
            == []
        )
    assert torch.equal(logits(whole), logits(model)) and torch.equal(logits(parts), logits(model))
    with pytest.raises(RuntimeError, match="unknown.weight"):
        whole.load_state_dict(tensors | {"unknown.weight": torch.zeros(1)})


def test_a_tied_models_file_loads_strictly_as_a_state_dict(tmp_path):
    model = tiny.model(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    other = tiny.model(seed=1, text={"tie_word_embeddings": True})
    for assign in (False, True):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=assign)
        assert torch.equal(logits(other), logits(model))
        assert other.lm_head.weight is other.get_input_embeddings().weight


def test_another_state_dict_can_be_saved(tmp_path):
    model, other = tiny.model(), tiny.model(seed=1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(other)
    )


def test_only_the_main_process_writes(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


def test_every_tensor_that_does_not_fit_is_named_in_one_error(saved):
    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.norm.weight"], tensors["multi_modal_projector.linear_1.bias"]
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["surprise"] = torch.zeros(1)
    tensors["language_model.lm_head.weight"] = torch.zeros(3, 64)
    tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(64, dtype=torch.int64)
    tensors["vision_tower.post_layernorm.bias"] = torch.zeros(32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        MllamaForConditionalGeneration.from_pretrained(folder)
    for part in (
        "missing (2): multi_modal_projector.linear_1.bias, language_model.model.norm.weight",
        "unexpected (2): language_model.model.layers.7.mlp.up_proj.weight, surprise",
        "language_model.lm_head.weight is float32 [3, 64], the model takes floating [99, 64]",
        "multi_modal_projector.linear_2.bias is int64 [64], the model takes floating [64]",
        "given twice (1)",
    ):
        assert part in str(error.value)


def test_a_head_that_should_be_tied_but_differs_is_refused(tmp_path):
    tiny.model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    save_file(
        tensors | {"language_model.lm_head.weight": embedding.clone()},
        tmp_path / "model.safetensors",
    )
    MllamaForConditionalGeneration.from_pretrained(tmp_path)
    save_file(
        tensors | {"language_model.lm_head.weight": embedding + 1}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="tied"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_tied_models_head_alone_is_its_embedding_too(tmp_path):
    """As safetensors' save_model and accelerate write it: of tensors that share memory the first by
    name.
    """
    model = tiny.model(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors.pop(
        "language_model.model.embed_tokens.weight"
    )
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight and torch.equal(
        logits(loaded), logits(model)
    )
    other = tiny.model(seed=1, text={"tie_word_embeddings": True})
    other.load_state_dict(tensors)
    assert torch.equal(logits(other), logits(model))
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing \(1\): language_model.model.embed_tokens.weight$"
    ):
        MllamaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (ValueError, "dtype must be", {"dtype": "int8"}),
        (ValueError, "dtype must be", {"dtype": torch.float64}),
        (ValueError, "dtype must be", {"dtype": 16}),
        (
            ValueError,
            "no device for multi_modal_projector",
            {"device_map": {"vision_tower": "cpu", "language_model": "cpu", "lm_head": "cpu"}},
        ),
        (ValueError, "the_encoder", {"device_map": {"the_encoder": "cpu", "": "cpu"}}),
        (ValueError, "disk", {"device_map": {"vision_tower": "disk", "": "cpu"}}),
        (ValueError, "'gpu'", {"device_map": "gpu"}),
        (TypeError, "ignore_mismatched_size", {"ignore_mismatched_sizes": True}),
    ],
)
def test_bad_options_are_refused(error, named, options, saved):
    if isinstance(options.get("device_map"), dict):
        pytest.importorskip("accelerate")
    with pytest.raises(error, match=named):
        MllamaForConditionalGeneration.from_pretrained(saved[0], **options)


def test_a_subfolder_is_honored(tmp_path):
    root, inner = tiny.model(), tiny.model(seed=1)
    root.save_pretrained(tmp_path)
    inner.save_pretrained(tmp_path / "inner")
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(tmp_path, subfolder="inner")),
        logits(inner),
    )
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(root)
    )
    with pytest.raises(FileNotFoundError, match="absent"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path, subfolder="absent")
    for outside in ("..", "inner/../..", str(tmp_path)):
        with pytest.raises(ValueError, match="subfolder"):
            MllamaForConditionalGeneration.from_pretrained(tmp_path / "inner", subfolder=outside)


@pytest.mark.parametrize("config", [{}, "x"])
def test_a_config_of_another_kind_is_a_type_error(config, saved):
    with pytest.raises(TypeError, match="config must be"):
        MllamaForConditionalGeneration.from_pretrained(saved[0], config=config)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"variant": "fp16"}),
        (ValueError, {"safe_serialization": False}),
        (ValueError, {"distributed_checkpoint": True}),
        (TypeError, {"max_shard": "1GB"}),
    ],
)
def test_options_that_a_save_cannot_follow_are_refused(error, options, tmp_path):
    with pytest.raises(error, match=next(iter(options))):
        tiny.model().save_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_options_that_others_pass_are_taken(tmp_path):
    tiny.model().save_pretrained(
        tmp_path,
        save_function=torch.save,
        safe_serialization=True,
        save_peft_format=True,
        save_original_format=True,
        token=None,
    )
    MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_state_dict_that_is_not_the_whole_model_is_refused(tmp_path):
    model = tiny.model()
    state = model.state_dict()
    del state["language_model.norm.weight"]
    state["language_model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"language_model.norm.weight.*layers.9.mlp"):
        model.save_pretrained(tmp_path / "model", state_dict=state)
    assert not (tmp_path / "model").exists()


def test_the_dtype_written_follows_the_tensors(tmp_path):
    model = tiny.model()
    model.save_pretrained(
        tmp_path, state_dict={name: value.bfloat16() for name, value in model.state_dict().items()}
    )
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
