"""Adapters in PEFT's format: what it writes is read, what is written it reads, onto transformers'
classes and the package's.
"""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mllama
import tiny
from mllama import MllamaForConditionalGeneration
from tiny.pairs import make, pair

peft = pytest.importorskip("peft")

CASES = ["llama", "gemma", "llava, clip, -2", "paligemma", "mllama"]


def both(case: str):
    """Ours and transformers' model with the same weights, and a batch."""
    found = make(case)
    return found.ours, found.theirs, pair(case).inputs("one row")


def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def adapted(model: nn.Module) -> nn.Module:
    """With adapters in every part, whose ranks and alphas differ by layer, and with a projector
    that learns whole where there is one.
    """
    made = mllama.convert_linears_to_lora(
        model.language_model, 2, 6, target_module_names=["q_proj", "down_proj"]
    )
    made |= mllama.convert_linears_to_lora(
        model.language_model, 3, 5.5, target_module_names=["layers.0.mlp.up_proj"]
    )
    model.requires_grad_(False)
    if model.spec.encoder:
        made |= mllama.convert_linears_to_lora(
            model.vision_tower, 4, 6, target_module_names=["fc1"]
        )
        model.multi_modal_projector.requires_grad_(True)
        for parameter in model.multi_modal_projector.parameters():
            nn.init.normal_(parameter, std=0.1)
    for layer in made.values():
        nn.init.normal_(layer.lora_b.weight, std=0.2)
    for parameter in mllama.lora_parameters(model):
        parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_peft_loads_onto_both_classes(case, tmp_path):
    ours, theirs, batch = both(case)
    plain, again = logits(ours, batch), both(case)[0]
    expected = logits(adapted(ours), batch)
    mllama.save_lora(ours, tmp_path / "adapters", format="peft")
    assert not torch.allclose(expected, plain, atol=1e-2)
    for model in (theirs, both(case)[0]):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
        torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-3, atol=1e-3)
    mllama.load_lora(again, tmp_path / "adapters")
    assert torch.equal(logits(again, batch), expected)
    learns = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {
        name for name, parameter in again.named_parameters() if parameter.requires_grad
    } == learns
    mllama.load_lora(adapted(again), tmp_path / "adapters" / "adapter_model.safetensors")
    assert torch.equal(logits(again, batch), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_what_peft_writes_is_read(case, whose, tmp_path):
    ours, theirs, batch = both(case)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        use_rslora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.0\.self_attn\.q_proj": 3},
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["layers.1.mlp.gate_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model({"ours": ours, "theirs": theirs}[whose], config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_(std=0.1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = both(case)[0]
    mllama.load_lora(again, tmp_path)
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-3, atol=1e-3)
    layers = [layer for layer in again.modules() if isinstance(layer, mllama.Linear_LORA)]
    assert {layer.rank for layer in layers} == {2, 4} and {layer.dropout.p for layer in layers} == {
        0.25
    }


@pytest.mark.parametrize("case", ["llama", "llava, clip, -2", "mllama"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
def test_frozen_matrices_of_embeddings_beside_adapters(case, targets, tmp_path):
    """PEFT writes them where a head is adapted or a vocabulary was resized: they are put in place,
    and do not learn.
    """
    theirs, batch = both(case)[1:]
    with torch.no_grad():
        theirs.get_output_embeddings().weight += 0.1
    model = peft.get_peft_model(
        theirs, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).eval()
    expected = logits(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    for again in (
        both(case)[0],
        mllama.convert_to_lora(both(case)[0].requires_grad_(False), targets, 2, 8),
    ):
        mllama.load_lora(again, tmp_path)
        torch.testing.assert_close(logits(again, batch), expected, rtol=1e-3, atol=1e-3)
        assert all(
            ".lora_" in name
            for name, parameter in again.named_parameters()
            if parameter.requires_grad
        )
        torch.testing.assert_close(
            logits(mllama.merge_and_unload(again), batch), expected, rtol=1e-3, atol=1e-3
        )


def test_trained_embeddings_written_with_what_they_were(tmp_path):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
    )
    model, batch = peft.get_peft_model(make("llama").theirs, config).eval(), both("llama")[2]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter += 0.1
    expected, again = logits(model, batch), make("llama").ours
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    mllama.load_lora(again, tmp_path)
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-3, atol=1e-3)
    assert again.lm_head.weight.requires_grad and again.get_input_embeddings().weight.requires_grad


def test_an_adapter_on_a_tied_head_is_read(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model, batch = peft.get_peft_model(make("gemma").theirs, config).eval(), both("gemma")[2]
    expected, again = logits(model, batch), make("gemma").ours
    model.save_pretrained(tmp_path)
    mllama.load_lora(again, tmp_path)
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-3, atol=1e-3)


def test_names_of_older_files(tmp_path):
    """Those of transformers 4, whose classes in memory were named as files still are."""
    ours, _, batch = both("llava, clip, -2")
    expected = logits(adapted(ours), batch)
    mllama.save_lora(ours, tmp_path, format="peft")
    file = tmp_path / "adapter_model.safetensors"
    older = {
        re.sub(r"model\.model\.language_model\.", "model.language_model.model.", key): value
        for key, value in load_file(file).items()
    }
    older = {
        re.sub(r"\.model\.(vision_tower|multi)", r".\1", key, count=1): value
        for key, value in older.items()
    }
    assert older.keys() != load_file(file).keys()
    save_file(older, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {
        "target_modules": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for name, tensor in older.items():
        if "lora_A" in name:
            config["rank_pattern"][
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            ] = len(tensor)
    config["alpha_pattern"] = {"layers.0.mlp.up_proj": 5.5}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = both("llava, clip, -2")[0]
    mllama.load_lora(again, tmp_path)
    assert torch.equal(logits(again, batch), expected)


@pytest.fixture
def written(tmp_path):
    """written(**changes): a folder of adapters with a changed config; a plain model beside it."""

    def write(**changes):
        model = adapted(make("llama").ours)
        mllama.save_lora(model, tmp_path / "adapters", format="peft")
        path = tmp_path / "adapters" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return tmp_path / "adapters"

    return write


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["experts"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("a_field_of_tomorrow", 1),
        ("r", 7),
        ("r", "2"),
        ("lora_alpha", -1),
        ("rank_pattern", {"q_proj": 7}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("target_modules", ["v_proj"]),
        ("lora_dropout", 2),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"[": 2}),
        ("alpha_pattern", [2]),
        ("target_modules", 3),
        ("modules_to_save", "norm"),
        ("modules_to_save", ["norm"]),  # its values are not in the file
        ("use_rslora", "no"),
    ],
)
def test_fields_that_are_not_honored_are_named(written, field, value):
    folder, model = written(**{field: value}), make("llama").ours
    with pytest.raises(ValueError, match=field):
        mllama.load_lora(model, folder)
    assert not any(isinstance(part, mllama.Linear_LORA) for part in model.modules())


def test_embeddings_are_refused(tmp_path):
    config = peft.LoraConfig(
        target_modules=["q_proj", "embed_tokens"], r=2, init_lora_weights=False
    )
    peft.get_peft_model(make("llama").ours, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embed_tokens"):
        mllama.load_lora(make("llama").ours, tmp_path)


def test_one_of_two_tied_parameters_is_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    peft.get_peft_model(make("gemma").ours, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="modules_to_save"):
        mllama.load_lora(make("gemma").ours, tmp_path)


@pytest.mark.parametrize("base", [None, "", 3, "itself"])
def test_a_base_model_that_cannot_be(written, base):
    folder = written()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(folder) if base == "itself" else base})
    )
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_what_is_no_adapter_is_said(tmp_path):
    model = make("llama").ours
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        with pytest.raises(ValueError, match="no adapters"):
            mllama.load_lora(model, path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="GGUF"):
        mllama.load_lora(model, tmp_path / "model.gguf")
    mllama.save_lora(adapted(make("llama").ours), tmp_path / "adapters", format="peft")
    (tmp_path / "adapters" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json"):
        mllama.load_lora(model, tmp_path / "adapters" / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        mllama.load_lora(model, tmp_path / "adapters")


def test_what_the_format_cannot_say_is_refused(tmp_path):
    model = adapted(make("llama").ours)
    with pytest.raises(ValueError, match="format"):
        mllama.save_lora(model, tmp_path / "adapters", format="gguf")
    model.language_model.layers[0].self_attn.k_proj.requires_grad_(True)
    mllama.convert_linears_to_lora(model.language_model, target_module_names=["o_proj"])
    model.language_model.layers[0].mlp.up_proj.linear.requires_grad_(True)
    with pytest.raises(ValueError, match="up_proj.linear.weight"):
        mllama.save_lora(model, tmp_path / "adapters", format="peft")
    assert not (tmp_path / "adapters").exists()


def test_a_whole_models_weights_are_not_replaced(tmp_path):
    make("llama").ours.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for save in (
        lambda model: model.save_pretrained(tmp_path),
        lambda model: mllama.save_lora(model, tmp_path, format="peft"),
    ):
        with pytest.raises(ValueError, match="whole model"):
            save(adapted(make("llama").ours))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_from_pretrained_loads_the_model_and_its_adapters(tmp_path, model_folder):
    model = MllamaForConditionalGeneration.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "model")
    model = adapted(MllamaForConditionalGeneration.from_pretrained(tmp_path / "model"))
    batch = {"input_ids": torch.tensor([tiny.tokens(5)])}
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapters")
    assert torch.equal(
        logits(MllamaForConditionalGeneration.from_pretrained(tmp_path / "adapters"), batch),
        expected,
    )
    again = mllama.load(model_folder, adapter=tmp_path / "adapters", dtype="float32", device="cpu")[
        0
    ]
    assert torch.equal(logits(again, batch), expected)
    with pytest.raises(ValueError, match="LoRA layers"):
        MllamaForConditionalGeneration.from_pretrained(model_folder).load_state_dict(
            load_file(file := tmp_path / "adapters/model.safetensors")
        )
    assert file.read_bytes() == (tmp_path / "adapters/adapter_model.safetensors").read_bytes()
    # The whole model in the same place: nobody takes it for adapters.
    mllama.merge_and_unload(model).save_pretrained(tmp_path / "adapters")
    merged = MllamaForConditionalGeneration.from_pretrained(tmp_path / "adapters")
    assert not any(isinstance(part, mllama.Linear_LORA) for part in merged.modules())
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-4)


def test_adapters_for_merged_weights_do_not_name_the_old_ones(tmp_path, model_folder):
    """A folder that did would load another model than was trained, without a word."""
    model = MllamaForConditionalGeneration.from_pretrained(model_folder)
    mllama.merge_and_unload(adapted(model)).save_pretrained(tmp_path / "merged")
    mllama.load_processor(model_folder).save_pretrained(tmp_path / "merged")
    model = copy.deepcopy(adapted(model))
    batch = {"input_ids": torch.tensor([tiny.tokens(5)])}
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "adapters")
    again = mllama.load(
        tmp_path / "merged", adapter=tmp_path / "adapters", dtype="float32", device="cpu"
    )[0]
    torch.testing.assert_close(logits(again, batch), expected)
