"""Weight files under the names of older scripts, read by `load_state_dict`."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import twins
from dropin import older
from mllama.dropin._older_checkpoints import TABLE
from mllama.dropin.model import (
    Linear_LORA,
    Llama3ForCausalLM,
    MllamaForConditionalGeneration,
    MultiModalProjector,
    convert_linears_to_lora,
)
from mllama.dropin.siglip import SiglipModel, SiglipVisionConfig
from mllama.weights.rows import to_file

EXACT = {"rtol": 0, "atol": 0}
TEXT = twins.tokens(6)
# Of one layer and one block, as the files of several ages have them.
LAYER = (
    *(
        "norm1.weight",
        "att.W_query.weight",
        "att.W_key.weight",
        "att.W_value.weight",
        "att.out_proj.weight",
    ),
    *("norm2.weight", "ff.fc1.weight", "ff.fc2.weight", "ff.fc3.weight"),
)
FUSED = {
    "ff.fc1.weight": "ff.swiglu.w_gate",
    "ff.fc2.weight": "ff.swiglu.w_up",
    "ff.fc3.weight": "ff.w_down.weight",
}
PLAIN_VIT = {
    "vision_model.vision_model.": "vision_model.",
    ".embedding.": ".embeddings.",
    "vision_model.layernorm": "vision_model.post_layernorm",
}


class Older(nn.Module):
    """The three parts as those files name them."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = SiglipModel(SiglipVisionConfig(**older.VISION))
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = Llama3ForCausalLM(config.text_config)

    def forward(self, pixel_values: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """A picture and the text after it -> logits."""
        features = self.multi_modal_projector(self.vision_model(pixel_values))
        embeds = self.language_model.model.tok_emb(text)
        return self.language_model(None, torch.cat([features, embeds], 1))[0]


@pytest.fixture
def loose():
    return twins.randomise(Older(older.config()), seed=5).eval()


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    changed = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        changed[name] = value
    return changed


def fresh() -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration(older.config()).eval()


@pytest.mark.parametrize(
    "names",
    [
        {},
        FUSED,
        {"ff.fc1": "ff.swiglu.w_gate", "ff.fc2": "ff.swiglu.w_up", "ff.fc3": "ff.w_down"},
        PLAIN_VIT,
    ],
)
def test_a_file_gives_the_older_models_logits(loose, names, tmp_path):
    save_file(renamed(loose.state_dict(), names), tmp_path / "checkpoint.safetensors")
    model = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = model.load_state_dict(load_file(tmp_path / "checkpoint.safetensors"), strict=False)
    assert not report.missing_keys and not report.unexpected_keys
    pictures = twins.pictures(1)
    torch.testing.assert_close(
        model(older.prompt(*TEXT), pictures)["logits"], loose(pictures, torch.tensor([TEXT]))
    )


def test_the_names_are_those_of_the_files(loose):
    names = set(loose.state_dict())
    assert {
        name.removeprefix("language_model.model.trf_blocks.1.")
        for name in names
        if "trf_blocks.1." in name
    } == set(LAYER)
    assert names >= {
        "language_model.model.tok_emb.weight",
        "language_model.model.final_norm.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear.weight",
        "multi_modal_projector.linear.bias",
        "vision_model.vision_model.embedding.patch_embedding.weight",
        "vision_model.vision_model.embedding.position_embedding.weight",
        "vision_model.vision_model.encoder.layers.0.layernorm1.weight",
        "vision_model.vision_model.encoder.layers.0.self_attn.q_proj.bias",
        "vision_model.vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.vision_model.layernorm.bias",
    }
    assert fresh().load_state_dict(loose.state_dict(), strict=True).missing_keys == []


def test_every_tensor_of_the_model_has_a_place_in_older_files(loose):
    state = {
        name: value
        for name, value in fresh().state_dict().items()
        if not name.startswith("multi_modal_projector")
    }
    theirs = renamed(loose.state_dict(), FUSED | {"ff.w_down": "ff.fc3"})
    assert to_file(TABLE, state).keys() == {
        name for name in theirs if not name.startswith("multi_modal_projector")
    }


def test_what_is_computed_is_passed_over(loose):
    state = loose.state_dict() | {
        "language_model.model.trf_blocks.0.att.rotary_emb.inv_freq": torch.ones(8),
        "vision_model.vision_model.embedding.position_ids": torch.arange(4)[None],
    }
    assert fresh().load_state_dict(state, strict=True).unexpected_keys == []


def test_biases_of_fused_blocks(loose):
    state = renamed(loose.state_dict(), FUSED) | {
        f"language_model.model.trf_blocks.{i}.ff.swiglu.b_gate": torch.ones(96) for i in range(2)
    }
    report = fresh().load_state_dict(state, strict=False)  # which this model does not have
    assert report.unexpected_keys == [
        f"language_model.layers.{i}.mlp.gate_proj.bias" for i in range(2)
    ]


def test_hugging_faces_names_and_the_models_own(tmp_path):
    model = older.model()
    model.save_pretrained(tmp_path)
    for state in (load_file(tmp_path / "model.safetensors"), model.state_dict()):
        same = fresh()
        assert not same.load_state_dict(state, strict=True).missing_keys
        assert all(
            torch.equal(value, model.state_dict()[name])
            for name, value in same.state_dict().items()
        )


def test_a_pickle_of_the_models_own_state(tmp_path):
    model, same = older.model(), fresh()
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    same.load_state_dict(torch.load(tmp_path / "ckpt.pt"))
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items()
    )


def test_a_load_that_matches_little_says_so(loose):
    state = {f"backbone.{name}": value for name, value in loose.state_dict().items()}
    state["language_model.lm_head.weight"] = loose.language_model.lm_head.weight.detach()
    model = fresh()
    said = f"1 of {len(state)} tensors found a place in the model .lm_head.weight.; not known: backbone.language_model"
    with pytest.warns(UserWarning, match=said):
        model.load_state_dict(state, strict=False)
    assert torch.equal(model.lm_head.weight, loose.language_model.lm_head.weight)
    with pytest.warns(
        UserWarning, match="0 of 0 tensors found a place in the model .none.; not known: none"
    ):
        model.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


@pytest.mark.parametrize("given", ["ckpt.pt", None, [1]])
def test_what_holds_no_names_is_refused(given):
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like"):
        fresh().load_state_dict(given, strict=False)


def test_another_shape_is_refused(loose):
    state = loose.state_dict() | {"language_model.model.final_norm.weight": torch.ones(3)}
    with pytest.raises(RuntimeError, match="size mismatch for language_model.norm.weight"):
        fresh().load_state_dict(state, strict=False)


def test_a_converted_models_tensors(loose):
    convert_linears_to_lora(loose.language_model)
    twins.randomise(loose, seed=7)
    model = fresh()
    convert_linears_to_lora(model.language_model)
    model.lm_head = Linear_LORA.around(model.lm_head, 4, 16)
    report = model.load_state_dict(loose.state_dict(), strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    pictures = twins.pictures(1)
    torch.testing.assert_close(
        model.eval()(older.prompt(*TEXT), pictures)["logits"],
        loose.eval()(pictures, torch.tensor([TEXT])),
    )


def test_adapters_alone_are_no_bad_match():
    model = fresh()
    convert_linears_to_lora(model.language_model)
    adapters = {name: value + 1 for name, value in model.state_dict().items() if "lora_" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(adapters, strict=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in adapters.items())
