"""`checkpoints.load` of a plain module: no transformers in it."""

import pytest
import torch
from torch import nn

import tiny
from mllama.checkpoints import load
from tiny import stock


class Names(nn.Module):
    """A module with the parameters of a state dict, whatever it would compute."""

    def __init__(self, shapes: dict[str, torch.Size]):
        super().__init__()
        for name, shape in shapes.items():
            owner, _, last = name.rpartition(".")
            module = self
            for part in filter(None, owner.split(".")):
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_into_a_module(tied, tmp_path):
    model = tiny.model(text={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    loaded, opened = load(tmp_path, lambda spec: Names(shapes), "bfloat16")
    assert not loaded.training and opened.family.name == "llava"
    assert opened.spec.text.hidden_size == 64 and opened.spec.image_token_index == tiny.IMAGE
    assert opened.config["text_config"]["rms_norm_eps"] == 1e-6
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16())
    embeddings = loaded.get_parameter("language_model.embed_tokens.weight")
    assert (loaded.get_parameter("lm_head.weight") is embeddings) is tied


def test_what_the_module_lacks_is_refused(tmp_path):
    stock.make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embed_tokens"):
        load(tmp_path, lambda spec: Names({"lm_head.weight": torch.Size([99, 64])}))
    with pytest.raises(ValueError, match="dtype"):
        load(tmp_path, lambda spec: Names({}), dtype="int8")
    with pytest.raises(ValueError, match="device"):
        load(tmp_path, lambda spec: Names({}), device="gpu")


@pytest.mark.parametrize(
    ("value", "fits"), [(65504.0, True), (1e5, False), (-1e5, False), (torch.inf, True)]
)
def test_values_that_float16_cannot_hold_are_refused(value, fits, tmp_path):
    model = tiny.model()
    model.lm_head.weight.data[3, 4] = value
    model.save_pretrained(tmp_path)
    module = Names({name: tensor.shape for name, tensor in model.state_dict().items()})
    assert load(tmp_path, lambda spec: module, "bfloat16")
    if fits:
        load(tmp_path, lambda spec: module, "float16")
        assert module.get_parameter("lm_head.weight")[3, 4] == value
    else:
        with pytest.raises(ValueError, match=r"lm_head.weight has values beyond"):
            load(tmp_path, lambda spec: module, "float16")
