"""Every format's table and config against what stock transformers saves: all is read, and what is
written stock reads back the same.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllama import MllamaForConditionalGeneration, SiglipModel
from mllama.checkpoints.files import save_weights, write_json
from mllama.checkpoints.loading import match
from mllama.checkpoints.sources import Header, open_safetensors
from mllama.families import family_of
from mllama.hf.config_objects import config_object
from mllama.weights.rows import plan_moves, to_file
from tiny import LLAMA3, stock


def read_folder(folder):
    """(family, config, the tensors under our names) of a folder."""
    content = json.loads((folder / "config.json").read_text())
    family = family_of(content)
    config = family.from_json(content)
    with open_safetensors(folder) as source:
        weight_map = family.weight_map(family.compose(config))
        moves, unknown, twice = plan_moves(weight_map, source.headers())
        assert not unknown and not twice
        values = {}
        for move in moves:
            values |= zip(
                move.ours,
                move.row.read([source.read(name).clone() for name in move.theirs]),
                strict=True,
            )
    return family, config, values


@pytest.mark.parametrize("case", stock.FORMATS)
def test_stock_reads_what_is_written_of_what_stock_wrote(case, tmp_path):
    model = stock.make(case)
    model.save_pretrained(tmp_path / "stock")
    family, config, values = read_folder(tmp_path / "stock")
    assert {name.split(".")[0] for name in values} <= {
        "language_model",
        "lm_head",
        "vision_tower",
        "multi_modal_projector",
        "head",
    }

    (tmp_path / "ours").mkdir()
    weight_map = family.weight_map(family.compose(config))
    save_weights(tmp_path / "ours", to_file(weight_map, values), "100KB")
    write_json(tmp_path / "ours" / "config.json", family.to_json(config))
    part = model.vision_model if case == "siglip" else model
    again, report = type(part).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.state_dict().keys() == {
        name for name in part.state_dict() if not name.startswith("model.vision_tower.head.")
    }
    for name, value in again.state_dict().items():
        assert torch.equal(value, part.state_dict()[name]), name
    assert family.compose(read_folder(tmp_path / "ours")[1]) == family.compose(config)
    assert read_folder(tmp_path / "ours")[2].keys() == values.keys()


def ours_of(case: str):
    return SiglipModel if case.startswith("siglip") else MllamaForConditionalGeneration


@pytest.mark.parametrize("case", stock.FORMATS)
def test_a_folder_of_stock_loads_and_is_written_back(case, tmp_path):
    model = stock.make(case)
    model.save_pretrained(tmp_path / "stock")
    loaded = ours_of(case).from_pretrained(tmp_path / "stock")
    part = model.vision_model if case == "siglip" else model
    assert type(loaded.config) is type(part.config)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    loaded.save_pretrained(tmp_path / "ours")
    again, report = type(part).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for name, value in again.state_dict().items():
        assert torch.equal(value, part.state_dict()[name]), name
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("stock", "ours")
    )
    assert (
        after["architectures"] == ["SiglipVisionModel"]
        if case == "siglip"
        else before["architectures"]
    )
    assert (
        "rope_parameters" not in json.dumps(after)
        and "dtype" not in after
        and after["torch_dtype"] == "float32"
    )


@pytest.mark.parametrize("case", stock.FORMATS)
def test_every_era_loads_as_a_state_dict(case, tmp_path):
    """The file's names as stock writes them, its names in memory, and ours."""
    model = stock.make(case)
    model.save_pretrained(tmp_path)
    loaded = ours_of(case).from_pretrained(tmp_path)
    expected = {name: value.clone() for name, value in loaded.state_dict().items()}
    file, memory = load_file(tmp_path / "model.safetensors"), model.state_dict()
    for names in (file, memory, expected):
        other = ours_of(case)(loaded.config)
        report = other.load_state_dict({name: value for name, value in names.items()})
        assert not report.missing_keys and not report.unexpected_keys
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    report = other.load_state_dict({"nobody.weight": torch.zeros(1)}, strict=False)
    assert report.unexpected_keys == ["nobody.weight"]


@pytest.mark.parametrize(
    ("case", "older"),
    [
        ("paligemma", ("vision_tower.", "vision_tower.vision_model.")),
        ("llava, clip, 2, tied", ("vision_tower.", "vision_tower.vision_model.")),
        ("siglip_vision_model", ("", "vision_model.")),
    ],
)
def test_the_released_spelling_is_read_and_written(case, older, tmp_path):
    stock.make(case).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        older[1] + name.removeprefix(older[0]) if name.startswith(older[0]) else name: value
        for name, value in tensors.items()
    }
    loaded = ours_of(case).from_pretrained(tmp_path)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = ours_of(case).from_pretrained(tmp_path)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items()
    )
    again.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == renamed.keys()


@pytest.mark.parametrize(
    "rope",
    [LLAMA3, {**LLAMA3, "type": "llama3"}, {k: v for k, v in LLAMA3.items() if k != "rope_type"}],
)
@pytest.mark.parametrize("new", [False, True])
def test_rope_is_read_in_either_spelling_and_written_in_the_older(rope, new, tmp_path):
    if "rope_type" not in rope:
        rope = {**rope, "type": "llama3"}
    stock.make("llama, factor 8").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("rope_parameters")
    content |= (
        {"rope_parameters": {**rope, "rope_theta": 5e5}}
        if new
        else {"rope_theta": 5e5, "rope_scaling": rope}
    )
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters.items() >= {**LLAMA3, "rope_theta": 5e5}.items()
    loaded.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (
        written["rope_theta"] == 5e5
        and written["rope_scaling"] == LLAMA3
        and "rope_parameters" not in written
    )


def test_mllamas_heads_are_read_under_either_name(tmp_path):
    stock.make("mllama").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"]["num_attention_heads"] = content["vision_config"].pop(
        "attention_heads"
    )
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vision_config.attention_heads == 2
    loaded.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["vision_config"]["attention_heads"] == 2
    )


def test_the_wrong_class_for_a_folder_says_so(tmp_path):
    stock.make("siglip_vision_model").save_pretrained(tmp_path / "siglip")
    stock.make("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="siglip_vision_model"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path / "siglip")
    with pytest.raises(TypeError, match="SiglipVisionConfig"):
        SiglipModel.from_pretrained(tmp_path / "llama")


def test_a_paligemma_with_a_gemma_3_is_refused_by_name(tmp_path):
    stock.make("paligemma").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["model_type"] = "gemma3_text"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="gemma3_text"):
        MllamaForConditionalGeneration.from_pretrained(tmp_path)


def names_of_llama_3_2_11b_vision():
    """Every name of the released files, from notes on the format, not from the table: {name:
    shape}.
    """
    names = {
        "language_model.model.embed_tokens.weight": (128264, 4096),
        "language_model.model.norm.weight": (4096,),
    }
    names["language_model.lm_head.weight"] = (128256, 4096)
    for layer in range(40):
        here = f"language_model.model.layers.{layer}."
        names |= {
            here + f"{norm}_layernorm.weight": (4096,) for norm in ("input", "post_attention")
        }
        names |= {
            here + "mlp.gate_proj.weight": (14336, 4096),
            here + "mlp.up_proj.weight": (14336, 4096),
        }
        names[here + "mlp.down_proj.weight"] = (4096, 14336)
        cross = layer in (3, 8, 13, 18, 23, 28, 33, 38)
        attention = here + ("cross_attn." if cross else "self_attn.")
        names |= {
            attention + f"{part}_proj.weight": (4096 if part in "qo" else 1024, 4096)
            for part in "qkvo"
        }
        if cross:
            names |= {attention + "q_norm.weight": (128,), attention + "k_norm.weight": (128,)}
            names |= {here + "cross_attn_attn_gate": (1,), here + "cross_attn_mlp_gate": (1,)}
    names |= {"multi_modal_projector.weight": (4096, 7680), "multi_modal_projector.bias": (4096,)}
    vision, patches = "vision_model.", (560 // 14) ** 2 + 1
    names |= {
        vision + "class_embedding": (1280,),
        vision + "patch_embedding.weight": (1280, 3, 14, 14),
    }
    names |= {
        f"{vision}layernorm_{place}.{kind}": (1280,)
        for place in ("pre", "post")
        for kind in ("weight", "bias")
    }
    position = vision + "gated_positional_embedding."
    names |= {
        position + "embedding": (patches, 1280),
        position + "gate": (1,),
        position + "tile_embedding.weight": (9, 4 * patches * 1280),
    }
    for place in ("pre", "post"):
        names[f"{vision}{place}_tile_positional_embedding.embedding.weight"] = (9, 4 * 1280)
        names[f"{vision}{place}_tile_positional_embedding.gate"] = (1,)
    for stack, layers in (("transformer", 32), ("global_transformer", 8)):
        for layer in range(layers):
            here = f"{vision}{stack}.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names |= {here + f"{norm}.{kind}": (1280,) for kind in ("weight", "bias")}
            names |= {here + f"self_attn.{part}_proj.weight": (1280, 1280) for part in "qkvo"}
            names |= {here + "mlp.fc1.weight": (5120, 1280), here + "mlp.fc1.bias": (5120,)}
            names |= {here + "mlp.fc2.weight": (1280, 5120), here + "mlp.fc2.bias": (1280,)}
            if stack == "global_transformer":
                names |= {here + "gate_attn": (1,), here + "gate_ffn": (1,)}
    return names


# What transformers 4 wrote into every config and sub-config, and released files have.
OLD = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "bfloat16",
    "torchscript": False,
    "transformers_version": "4.45.0.dev0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}


@pytest.mark.parametrize("case", stock.FORMATS)
def test_the_fields_of_older_files_are_read_past(case, tmp_path):
    stock.make(case).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part in (content, *(value for name, value in content.items() if name.endswith("_config"))):
        part |= {name: value for name, value in OLD.items() if name not in part}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = ours_of(case).from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32  # the file's own, whatever the config says
    loaded.save_pretrained(tmp_path)
    ours_of(case).from_pretrained(tmp_path)


def test_every_name_of_llama_3_2_11b_vision_is_accounted_for():
    content = OLD | {
        "model_type": "mllama",
        "image_token_index": 128256,
        "vision_config": OLD
        | {
            "model_type": "mllama_vision_model",
            "image_size": 560,
            "attention_heads": 16,
            "tie_word_embeddings": True,
        },
        "text_config": OLD
        | {"model_type": "mllama_text_model", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    }
    family = family_of(content)
    weight_map = family.weight_map(family.compose(content))
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config_object(family.from_json(content)))
    names = names_of_llama_3_2_11b_vision()
    headers = {name: Header(shape, torch.bfloat16) for name, shape in names.items()}
    report = match(model.state_dict(), headers, weight_map)
    assert report.problems() == "" and not report.lacking and report.dtype == torch.bfloat16
    assert to_file(weight_map, model.state_dict()).keys() == names.keys()
    assert sum(torch.Size(shape).numel() for shape in names.values()) == sum(
        value.numel() for value in model.state_dict().values()
    )
    assert 10.6e9 < model.num_parameters() < 10.8e9
