"""Model folders: what is saved loads to the same model, here and in stock transformers; what does not fit is refused with every name."""

import json
import pickle
import stat
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import twins
from mllama import MllamaConfig, MllamaForConditionalGeneration
from mllama.checkpoints import engine, files, llava, models

PICTURE = [twins.IMAGE] * twins.PATCHES
INPUTS = twins.batch(PICTURE + twins.tokens(6), twins.tokens(3) + PICTURE + twins.tokens(2)) | {"pixel_values": twins.pictures(2)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits[INPUTS["attention_mask"].bool()]


def change(folder, edit, name="config.json"):
    """Edit a JSON file of a folder in place."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def saved(tmp_path):
    """A folder in LLaVA's layout, and its model."""
    model = twins.model()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


OPTIONS = {
    "LLaVA": {},
    "LLaVA, tied": {"text": {"tie_word_embeddings": True}},
    "LLaVA, llama3 rope": {
        "text": {"rope_freq": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 16}}
    },
    "last": {"vision_feature": "last"},
    "inner width": {"projection_dim": 24},
    "placeholder not known": {"image_token_index": None},
    "placeholder beyond the vocabulary": {"image_token_index": 200},
}


@pytest.mark.parametrize("shard", ["5GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_saved_loads_equal(case, shard, tmp_path):
    model = twins.model(**OPTIONS[case])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.training
    for (name, value), (other, again) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, again)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is loaded.config.tie_word_embeddings
    for name in ("text_config", "vision_config"):
        before, after = (getattr(config, name).to_dict() for config in (model.config, loaded.config))
        assert {key: value for key, value in before.items() if key in after} == after
    for name in ("image_token_index", "ignore_index", "projection_dim", "vision_feature"):
        if hasattr(loaded.config, name):
            assert getattr(model.config, name) == getattr(loaded.config, name)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == ("llava" if case.startswith("LLaVA") else "siglip_llama")
    assert (tmp_path / "model.safetensors").exists() is (shard == "5GB")


@pytest.mark.parametrize("case", [case for case in OPTIONS if case.startswith("LLaVA")])
def test_stock_transformers_reads_a_llava_folder(case, tmp_path):
    model = twins.model(**OPTIONS[case])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    stock, report = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    expected = logits(model)
    assert (logits(stock) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_llava_folder_holds_the_names_that_older_readers_know(saved):
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
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
    twins.model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_what_stock_transformers_saves_is_read(tmp_path):
    model = twins.model()
    twins.twin(model).save_pretrained(tmp_path)
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(model))


def test_the_towers_pooling_head_is_read_past(saved):
    folder, model = saved
    tensors = load_file(folder / "model.safetensors") | {"vision_tower.vision_model.head.probe": torch.zeros(1, 1, 32)}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(folder)), logits(model))


def test_the_auto_class_knows_our_own_format(tmp_path):
    model = twins.model(vision_feature="last")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is MllamaForConditionalGeneration and torch.equal(logits(loaded), logits(model))


def test_the_config_of_either_format_is_read_alone(saved):
    folder, model = saved
    assert MllamaConfig.from_pretrained(folder).text_config.to_dict() == model.config.text_config.to_dict()


def test_the_generation_config_is_kept(saved):
    folder, model = saved
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    assert MllamaForConditionalGeneration.from_pretrained(folder).generation_config.max_new_tokens == 7


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
    ],
)
def test_dtypes(asked, got, tmp_path):
    model = twins.model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"}, **asked)
    assert {parameter.dtype for parameter in loaded.parameters()} == {got}
    assert loaded.config.dtype == got
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(got))
    assert logits(loaded).isfinite().all()


def test_a_loaded_model_is_trained_and_saved_again(saved, tmp_path):
    folder, _ = saved
    model = MllamaForConditionalGeneration.from_pretrained(folder).train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().save_pretrained(folder)  # over the files it was loaded from
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(folder)), logits(model))


def test_a_loaded_model_does_not_hang_on_its_files(saved):
    folder, model = saved
    loaded = MllamaForConditionalGeneration.from_pretrained(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(0)
    assert torch.equal(logits(loaded), logits(model))


def test_the_files_names_load_as_a_state_dict(saved):
    """Trainer resumes this way: all at once, or shard by shard with strict=False."""
    folder, model = saved
    tensors = load_file(folder / "model.safetensors")
    whole = twins.model(seed=1)
    assert whole.load_state_dict(tensors) == ([], [])
    parts = twins.model(seed=1)
    names = sorted(tensors)
    for part in (names[::2], names[1::2]):
        assert parts.load_state_dict({name: tensors[name] for name in part}, strict=False).unexpected_keys == []
    assert torch.equal(logits(whole), logits(model)) and torch.equal(logits(parts), logits(model))
    with pytest.raises(RuntimeError, match="unknown.weight"):
        whole.load_state_dict(tensors | {"unknown.weight": torch.zeros(1)})


def test_a_tied_models_file_loads_strictly_as_a_state_dict(tmp_path):
    model = twins.model(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    other = twins.model(seed=1, text={"tie_word_embeddings": True})
    for assign in (False, True):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=assign)
        assert torch.equal(logits(other), logits(model))
        assert other.lm_head.weight is other.get_input_embeddings().weight


def test_another_state_dict_can_be_saved(tmp_path):
    model, other = twins.model(), twins.model(seed=1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(other))


def test_only_the_main_process_writes(tmp_path):
    twins.model().save_pretrained(tmp_path / "model", is_main_process=False)
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
    twins.model(text={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors | {"language_model.lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    MllamaForConditionalGeneration.from_pretrained(tmp_path)
    save_file(tensors | {"language_model.lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tied"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_absent_folders_and_files(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        MllamaForConditionalGeneration.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_pickle_is_never_opened(saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (open, (str(folder / "sprung"), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        MllamaForConditionalGeneration.from_pretrained(folder)
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c.update(model_type="mistral"), "model_type 'mistral' is not known"),
        (lambda c: c.update(model_type="LLaVA"), "model_type 'LLaVA' is not known"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.update(model_type=["llava"]), "is not known"),
        (lambda c: c.update(vision_feature_layer=-9), "vision_feature_layer"),
        (lambda c: c.update(vision_feature_select_strategy="x"), "vision_feature_select_strategy"),
        (lambda c: c["text_config"].update(model_type="gemma"), "text_config of model_type 'gemma'"),
        (lambda c: c["text_config"].update(model_type=["llama"]), "text_config of model_type"),
        (lambda c: c["vision_config"].update(model_type="clip_vision_model"), "class_embedding"),
        (lambda c: c.pop("vision_config"), "class_embedding"),
        (lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
        (lambda c: c["text_config"].update(num_attention_heads=0), "num_attention_heads"),
        (lambda c: c["text_config"].update(hidden_size="64"), "hidden_size"),
        (lambda c: c.update(image_token_index="x"), "image_token_index"),
    ],
)
def test_configs_that_do_not_fit_are_refused(edit, named, saved):
    folder, _ = saved
    change(folder, edit)
    with pytest.raises(ValueError, match=named):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"llava"', "[" * 100000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text, saved):
    folder, _ = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_config_fields_that_steer_code_are_left_out(saved):
    folder, _ = saved
    steering = {"_attn_implementation_internal": "x/y", "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
    change(folder, lambda c: (c.update(steering), c["text_config"].update(steering)))
    loaded = MllamaForConditionalGeneration.from_pretrained(folder)
    assert loaded.config._attn_implementation == "eager" and loaded.config.text_config._attn_implementation in (None, "eager")
    assert not hasattr(loaded.config, "auto_map") and not hasattr(loaded.config.text_config, "trust_remote_code")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "[:12]])
def test_broken_weight_files_are_refused(content, saved):
    folder, _ = saved
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_a_cut_weight_file_is_refused(saved):
    folder, _ = saved
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def sharded(tmp_path):
    twins.model().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/tmp/model.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "model.bin",
        "a\\b.safetensors",
        "\ud800.safetensors",
        "\0.safetensors",
    ],
)
def test_shard_names_stay_inside_the_folder(shard, sharded):
    change(sharded, lambda c: c["weight_map"].update({"surprise": shard}), files.INDEX)
    with pytest.raises(ValueError, match="inside the folder"):
        MllamaForConditionalGeneration.from_pretrained(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    change(sharded, lambda c: c["weight_map"].update({"surprise": "model-00001-of-00005.safetensors"}), files.INDEX)
    with pytest.raises(ValueError, match="do not hold: surprise"):
        MllamaForConditionalGeneration.from_pretrained(sharded)
    change(sharded, lambda c: (c["weight_map"].pop("surprise"), c["weight_map"].pop("multi_modal_projector.linear_1.bias")), files.INDEX)
    with pytest.raises(ValueError, match="linear_1.bias', which model.safetensors.index.json places in no file"):
        MllamaForConditionalGeneration.from_pretrained(sharded)
    change(sharded, lambda c: c.update(weight_map=["x"]), files.INDEX)
    with pytest.raises(ValueError, match="weight_map"):
        MllamaForConditionalGeneration.from_pretrained(sharded)


def test_a_missing_shard_is_a_missing_file(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        MllamaForConditionalGeneration.from_pretrained(sharded)


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
        (ValueError, "the_tower", {"device_map": {"the_tower": "cpu", "": "cpu"}}),
        (ValueError, "disk", {"device_map": {"vision_tower": "disk", "": "cpu"}}),
        (ValueError, "'gpu' is not a device", {"device_map": "gpu"}),
        (TypeError, "ignore_mismatched_size", {"ignore_mismatched_sizes": True}),
    ],
)
def test_bad_options_are_refused(error, named, options, saved):
    with pytest.raises(error, match=named):
        MllamaForConditionalGeneration.from_pretrained(saved[0], **options)


def test_saving_again_leaves_no_older_weights_and_keeps_other_files(tmp_path):
    model = twins.model()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for shard in ("100KB", "5GB", "150KB", "100KB"):
        model.save_pretrained(folder, max_shard_size=shard)
        assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(folder)), logits(model))
        weights = {path.name for path in folder.glob("*.safetensors")}
        index = folder / files.INDEX
        assert weights == (set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"})
    assert {path.name for path in folder.iterdir()} - weights == {"tokenizer.json", "config.json", "generation_config.json", files.INDEX}
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("exists", [False, True], ids=["a new folder", "over an older model"])
def test_a_save_that_fails_changes_nothing(exists, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if exists:
        twins.model().save_pretrained(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(path, *args):
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(models, "save_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        twins.model(seed=1).save_pretrained(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.exists() is exists


def interrupt(monkeypatch, after, times):
    """Have the renames of a save fail: the first `after` are done, the next `times` raise."""
    replace, calls = files.os.replace, []

    def replace_or_raise(source, target):
        calls.append(target)
        if after < len(calls) <= after + times:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replace_or_raise)


@pytest.mark.parametrize("after", [0, 1, 3, 7, 8, 9, 12])
def test_an_interrupt_between_the_renames_leaves_the_older_model(after, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    twins.model().save_pretrained(folder, max_shard_size="100KB")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    interrupt(monkeypatch, after, times=1)
    with pytest.raises(KeyboardInterrupt):
        twins.model(seed=1).save_pretrained(folder, max_shard_size="100KB")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_the_older_weights_are_kept_aside_where_they_cannot_be_put_back(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    twins.model().save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    interrupt(monkeypatch, after=4, times=100)
    with pytest.raises(KeyboardInterrupt):
        twins.model(seed=1).save_pretrained(folder)
    with pytest.raises(FileNotFoundError):
        MllamaForConditionalGeneration.from_pretrained(folder)
    (kept,) = folder.glob(".*-old/model.safetensors")
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c["text_config"].update(num_hidden_layers=1000000), "text_config: num_hidden_layers is 1000000"),
        (lambda c: c["vision_config"].update(num_hidden_layers=1000000), "vision_config: num_hidden_layers is 1000000"),
        (lambda c: c["text_config"].update(vocab_size=2**40), "vocab_size"),
        (lambda c: c["text_config"].update(intermediate_size=2**63), "intermediate_size"),
        (lambda c: c["vision_config"].update(image_size=2**31 - 1, patch_size=1), "image_size"),
        (lambda c: c["text_config"].update(torch_dtype="foo"), "torch_dtype"),
        (lambda c: c["text_config"].update(torch_dtype="load"), "torch_dtype"),
        (lambda c: c["text_config"].update(self=1), "'self'"),
        (lambda c: c["vision_config"].update(to_dict=3), "'to_dict'"),
        (lambda c: c.update(self=1), "'self'"),
        (lambda c: c.update(to_dict=3), "'to_dict'"),
        (lambda c: c.update(text_config="x"), "text_config"),
        (lambda c: c.update(vision_config=[1]), "vision_config"),
        (lambda c: c["text_config"].update(rope_theta=[1]), "rope_theta"),
        (lambda c: c["text_config"].update(rope_scaling={"rope_type": []}), "rope_type"),
    ],
)
def test_hostile_configs_are_refused_by_name(edit, named, saved):
    folder, _ = saved
    change(folder, edit)
    with pytest.raises(ValueError, match=named):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("content", [{"max_new_tokens": "a"}, {"watermarking_config": {"a": 1}}, {"to_dict": 3}, {"self": 1}])
def test_a_generation_config_that_cannot_be_is_refused(content, saved):
    folder, _ = saved
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_a_subfolder_is_honoured(tmp_path):
    root, inner = twins.model(), twins.model(seed=1)
    root.save_pretrained(tmp_path)
    inner.save_pretrained(tmp_path / "inner")
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(tmp_path, subfolder="inner")), logits(inner))
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(tmp_path)), logits(root))
    with pytest.raises(FileNotFoundError, match="absent"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path, subfolder="absent")
    for outside in ("..", "inner/../..", str(tmp_path)):
        with pytest.raises(ValueError, match="subfolder"):
            MllamaForConditionalGeneration.from_pretrained(tmp_path / "inner", subfolder=outside)


@pytest.mark.parametrize("config", [{}, "x"])
def test_a_config_of_another_kind_is_a_type_error(config, saved):
    with pytest.raises(TypeError, match="config must be a LlavaConfig"):
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
        twins.model().save_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_options_that_others_pass_are_taken(tmp_path):
    twins.model().save_pretrained(
        tmp_path, save_function=torch.save, safe_serialization=True, save_peft_format=True, save_original_format=True, token=None
    )
    MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_state_dict_that_is_not_the_whole_model_is_refused(tmp_path):
    model = twins.model()
    state = model.state_dict()
    del state["language_model.norm.weight"]
    state["language_model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"lacks \(1\): language_model.norm.weight; .*layers.9.mlp"):
        model.save_pretrained(tmp_path / "model", state_dict=state)
    assert not (tmp_path / "model").exists()


def test_the_dtype_written_follows_the_tensors(tmp_path):
    model = twins.model()
    model.save_pretrained(tmp_path, state_dict={name: value.bfloat16() for name, value in model.state_dict().items()})
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_is_saved_has_ordinary_permissions(saved):
    folder, _ = saved
    other = folder.parent / "other"
    other.mkdir()
    (other / "file").touch()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {stat.S_IMODE((other / "file").stat().st_mode)}


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        twins.model().save_pretrained(tmp_path / "model")


def test_the_table_is_invertible():
    for name in twins.model().state_dict():
        (theirs,) = engine.file_names(llava.TABLE, name)
        (move,), unknown, twice = engine.plan(llava.TABLE, [theirs])
        assert move.ours == [name] and not unknown and not twice
    with pytest.raises(ValueError, match="no place"):
        engine.file_names(llava.TABLE, "surprise")


PARTS = ("vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model", "lm_head")


def test_a_map_of_devices_goes_to_accelerate(saved):
    pytest.importorskip("accelerate")
    folder, model = saved
    loaded = MllamaForConditionalGeneration.from_pretrained(folder, device_map=dict.fromkeys(PARTS, "cpu"))
    assert loaded.hf_device_map == dict.fromkeys(PARTS, "cpu") and torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"": "cpu"}, torch.device("cpu"), None])
def test_one_device_needs_no_accelerate(device_map, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder, model = saved
    assert torch.equal(logits(MllamaForConditionalGeneration.from_pretrained(folder, device_map=device_map)), logits(model))
    with pytest.raises(ImportError, match="accelerate"):
        MllamaForConditionalGeneration.from_pretrained(folder, device_map=dict.fromkeys(PARTS, "cpu"))


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
        assert loaded.hf_device_map == dict.fromkeys(PARTS, "cpu") and torch.equal(logits(loaded), logits(model))
    assert len(asked) == 4 and "DecoderLayer" in asked[0]
