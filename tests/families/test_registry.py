"""Every family is known whole: what one place of the package asks of it is there."""

import dataclasses
import importlib

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from mllama import families
from mllama.checkpoints.models import tied_names
from mllama.families import FAMILIES, MODEL_TYPES, compose
from mllama.hf.config_objects import config_object
from mllama.hf.models import model_class
from mllama.model.memory import Work, memory_needed
from mllama.processing import auto
from mllama.weights.rows import plan_moves, to_file
from tiny import stock

TEXT = {"vocab_size": 20, "num_hidden_layers": 2, "intermediate_size": 24, "hidden_size": 16}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
VISION = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 12, "image_size": 8}
VISION |= {"num_attention_heads": 2, "attention_heads": 2, "patch_size": 4}
TILED = {"num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 16}


def tiny(name: str) -> dict:
    """The content of a small config.json."""
    content = {"model_type": name, "projection_dim": 16}
    defaults = FAMILIES[name].defaults
    for part, sizes in (("text_config", TEXT), ("vision_config", VISION)):
        if part in defaults:
            own = {"model_type": defaults[part]["model_type"]}
            content[part] = own | {key: sizes[key] for key in sizes if key in defaults[part]}
    if name == "mllama":
        content["text_config"]["cross_attention_layers"] = [1]
        content["vision_config"] |= TILED
    sizes = TEXT if "vocab_size" in defaults else VISION
    return content | {key: sizes[key] for key in sizes if key in defaults}


def make(name: str):
    config = FAMILIES[name].from_json(tiny(name))
    with torch.device("meta"):
        return model_class(compose(config))(config_object(config))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weight_map_covers_every_parameter_both_ways(name):
    model, family = make(name), FAMILIES[name]
    spec = compose(tiny(name))
    weight_map, tied = family.weight_map(spec), tied_names(spec)
    own = {key: value for key, value in model.state_dict().items() if key not in tied}
    assert tied == model.get_expanded_tied_weights_keys()
    written = to_file(weight_map, own)
    moves, unknown, twice = plan_moves(weight_map, written)
    assert not unknown and not twice
    read = {}
    for move in moves:
        read |= zip(move.ours, move.row.read([written[key] for key in move.theirs]), strict=True)
    assert {key: value.shape for key, value in read.items()} == {
        key: value.shape for key, value in own.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_comes_back_from_its_file(name):
    family = FAMILIES[name]
    config = family.from_json(tiny(name))
    assert compose(family.to_json(config)) == compose(config) == compose(tiny(name))
    assert family.from_json(config) == config
    assert config_object(config).model_type == name


@pytest.mark.parametrize("name", FAMILIES)
def test_what_other_places_ask(name):
    family = FAMILIES[name]
    if family.stock_class is not None:
        kind = getattr(transformers, family.stock_class)
        assert kind.config_class.model_type == name
        assert any(case.split(",")[0] == name for case in stock.FORMATS)
    model = make(name)
    needed = memory_needed(model, Work(8, 1, 1, torch.float32))
    assert needed["weights"] and all(count >= 0 for count in needed.values())
    assert families.stock_prefixes(family.from_json(tiny(name))) == family.stock_prefixes
    assert family.processor is not None or model.spec.encoder is None
    assert {prefix.split(".")[0] for prefix, _ in family.stock_prefixes} <= {
        key for key, _ in model.named_children()
    }


def test_processors_know_every_family_with_images():
    for name, family in MODEL_TYPES.items():
        if family.processor is not None:
            assert family.processor in auto._READERS, name
            assert family.stock_processor is None or hasattr(transformers, family.stock_processor)


def test_gguf_architectures():
    reader = pytest.importorskip("gguf") and importlib.import_module(
        "mllama.checkpoints.gguf.reader"
    )
    writer = importlib.import_module("mllama.checkpoints.gguf.writer")
    assert {"llama", "gemma"} <= reader.ARCHITECTURES.keys()
    for family in reader.ARCHITECTURES.values():
        spec = compose(tiny(family.name))
        model = make(family.name)
        if spec.text.layers[0].post_norms:
            continue  # read, not written
        assert writer.find_gguf_form(spec.text) is family.gguf
        names = model.state_dict().keys() - tied_names(spec).keys()
        own = {name: model.state_dict()[name] for name in names}
        assert len(to_file(reader.weight_map(family.gguf, spec), own)) == len(own)
    windowed = compose(tiny("gemma2")).text
    for text in (windowed, dataclasses.replace(windowed, tie_word_embeddings=False)):
        with pytest.raises(ValueError):
            writer.find_gguf_form(text)


def fields(defaults: dict, stock: dict, where: str = "") -> list[str]:
    """Fields whose default is another one than transformers'."""
    wrong = []
    for name, value in defaults.items():
        if name.endswith("_config"):
            wrong += fields(value, stock[name], f"{name}.")
        elif name == "sliding_window_pattern":  # transformers keeps what follows from it
            assert len(stock["layer_types"]) == stock["num_hidden_layers"]
        elif value is not None and stock[name] != value:
            wrong.append(f"{where}{name}: {value} for {stock[name]}")
    return wrong


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].stock_class])
def test_defaults_are_transformers(name):
    family = FAMILIES[name]
    own = CONFIG_MAPPING[name]().to_dict()
    assert fields(family.defaults, own) == []
    assert compose(own) == compose({"model_type": name})
    for part, kinds in family.parts.items():
        for kind in kinds:
            stock_part = CONFIG_MAPPING[kind["model_type"]]().to_dict()
            assert fields(kind, stock_part) == [], (part, kind["model_type"])


def test_defaults_of_our_own_config():
    own = CONFIG_MAPPING["siglip_llama"]().to_dict()
    assert compose(own) == compose({"model_type": "siglip_llama"})
