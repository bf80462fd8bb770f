"""Adapters in files: written whole, read strictly, hostile ones too."""

import json
import os
import pickle
import struct
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mllama
from mllama import Linear_LORA


def keys(*names: str) -> list[str]:
    return [f"{name}.{part}.weight" for name in names for part in ("lora_a", "lora_b")]


def plain() -> nn.Sequential:
    """`converted` before it was."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)
    ).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "adapters.safetensors"


def test_saved_and_loaded(converted, path):
    model, x = converted(), torch.randn(5, 6)
    mllama.save_lora(model, path)
    assert sorted(load_file(path)) == keys("0", "4")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "alpha": '{"0": 16.0, "4": 16.0}'}
    again = converted(seed=0)
    for parameter in mllama.lora_parameters(again):
        nn.init.normal_(parameter)
    assert mllama.load_lora(again, str(path)) is None
    assert torch.equal(again(x), model(x))
    assert all(parameter.requires_grad for parameter in mllama.lora_parameters(again))


def test_what_the_file_has_no_place_for_is_named(converted, path, tmp_path):
    model = converted()
    model[2].requires_grad_(True)  # trained in full beside the adapters
    with pytest.warns(UserWarning, match="no place for 2, which can be trained .* PEFT's format"):
        mllama.save_lora(model, path)
    with warnings.catch_warnings(action="error"):
        mllama.save_lora(model, tmp_path / "peft", format="peft")
        mllama.save_lora(converted(), path)


def test_the_file_can_be_read_as_any_other_and_nothing_lies_beside_it(converted, path):
    old = os.umask(0o022)
    try:
        mllama.save_lora(converted(), path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["adapters.safetensors"]


def test_a_failed_save_leaves_the_older_file(converted, path, monkeypatch):
    mllama.save_lora(converted(), path)
    before = path.read_bytes()
    monkeypatch.setattr("mllama.checkpoints.files.save_file", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mllama.save_lora(converted(seed=1), path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_a_folder_is_no_file(converted, tmp_path):
    with pytest.raises(ValueError, match="path"):
        mllama.save_lora(converted(), tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file of adapters"):
        mllama.load_lora(converted(), tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file of adapters"):
        mllama.load_lora(converted(), tmp_path / "absent.safetensors")


def test_a_plain_model_is_converted_as_the_file_says(converted, path):
    model, x = converted(rank=2, alpha=5, target_module_names="0"), torch.randn(5, 6)
    nn.init.normal_(
        mllama.convert_linears_to_lora(model, rank=3, alpha=7, target_module_names="4")[
            "4"
        ].lora_b.weight
    )
    mllama.save_lora(model, path)
    again = plain()
    mllama.load_lora(again, path)
    assert torch.equal(again(x), model(x))
    found = {
        name: (layer.rank, layer.alpha)
        for name, layer in again.named_children()
        if isinstance(layer, Linear_LORA)
    }
    assert found == {"0": (2, 5), "4": (3, 7)}
    assert [
        name for name, parameter in again.named_parameters() if parameter.requires_grad
    ] == keys("0", "4")


def test_values_are_cast_to_the_adapters_dtype(converted, path):
    mllama.save_lora(converted(), path)
    saved = load_file(path)["4.lora_b.weight"]
    fresh, cast = plain().bfloat16(), converted(seed=1).bfloat16()
    for model, expected in ((fresh, saved), (cast, saved.bfloat16())):
        mllama.load_lora(model, path)
        assert model[4].linear.weight.dtype == torch.bfloat16
        assert torch.equal(model[4].lora_b.weight, expected)
        assert model[4].lora_b.weight.dtype == expected.dtype


def test_a_merged_model_takes_other_adapters(converted, path):
    model, again, x = converted(), converted(), torch.randn(5, 6)
    for parameter in mllama.lora_parameters(model):
        nn.init.normal_(parameter)
    mllama.save_lora(model, path)
    mllama.merge_lora(again)
    mllama.load_lora(again, path)
    assert again[0].merged_weight is not None
    torch.testing.assert_close(again(x), model(x))


def test_one_layer_in_several_places_and_a_lone_one(converted, path):
    model, x = nn.ModuleDict({"first": nn.Linear(6, 6)}), torch.randn(3, 6)
    model["again"] = model["first"]
    nn.init.normal_(mllama.convert_linears_to_lora(model)["again"].lora_b.weight)
    mllama.save_lora(model, path)
    again = nn.ModuleDict({"again": nn.Linear(6, 6)})  # in the other order
    again["first"] = again["again"]
    again["first"].load_state_dict(model["first"].linear.state_dict())
    mllama.load_lora(again, path)
    assert again["first"] is again["again"] and torch.equal(again["again"](x), model["first"](x))
    mllama.save_lora(model["first"], path)
    assert sorted(load_file(path)) == ["lora_a.weight", "lora_b.weight"]
    with pytest.raises(ValueError, match="lora_a.weight, lora_b.weight"):
        mllama.load_lora(nn.Linear(6, 6), path)
    nn.init.zeros_(again["first"].lora_a.weight)
    mllama.load_lora(again["first"], path)
    assert torch.equal(again["again"](x), model["first"](x))


def test_adapters_that_share_memory_are_written(converted, path):
    model = converted(target_module_names=["0", "2"])
    model[2].lora_b.weight = model[0].lora_b.weight
    mllama.save_lora(model, path)
    assert torch.equal(load_file(path)["0.lora_b.weight"], load_file(path)["2.lora_b.weight"])


def test_an_older_pth_is_read(converted, tmp_path):
    model, again, x = converted(), converted(), torch.randn(5, 6)
    state = {}
    for name, module in model.named_modules():  # as scripts save them
        if isinstance(module, Linear_LORA):
            nn.init.normal_(module.lora_a.weight)
            state[f"{name}.lora_a.weight"] = module.lora_a.weight.cpu()
            state[f"{name}.lora_b.weight"] = module.lora_b.weight.cpu()
    torch.save(state, tmp_path / "lora_adapters.pth")
    mllama.load_lora(again, tmp_path / "lora_adapters.pth")
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match=r"\.pth.*convert_linears_to_lora"):
        mllama.load_lora(plain(), tmp_path / "lora_adapters.pth")


def test_another_alpha_is_refused(converted, path):
    mllama.save_lora(converted(alpha=32), path)
    model = converted(seed=1)
    before = [parameter.clone() for parameter in mllama.lora_parameters(model)]
    with pytest.raises(ValueError, match=r"alpha: 0 32.0, not 16, 4 32.0, not 16"):
        mllama.load_lora(model, path)
    assert all(map(torch.equal, mllama.lora_parameters(model), before))


def test_all_that_does_not_fit_is_one_error(converted, path):
    path.parent.mkdir()
    tensors = {
        "0.lora_a.weight": torch.zeros(5, 6),
        "0.lora_b.weight": torch.zeros(9, 4, dtype=torch.int32),
        "2.lora_a.weight": torch.zeros(4, 9),
    }
    save_file(tensors | {"evil\x1b[31m": torch.zeros(1)}, path)
    model = converted()
    before = [parameter.clone() for parameter in mllama.lora_parameters(model)]
    with pytest.raises(ValueError) as caught:
        mllama.load_lora(model, path)
    assert str(caught.value) == (
        f"the adapters in {path} do not fit: not in the model (2): 2.lora_a.weight, "
        "'evil\\x1b[31m'; not in the file (2): 4.lora_a.weight,"
        " 4.lora_b.weight; of another shape or type (2): 0.lora_a.weight is [5, 6] of float32, not "
        "[4, 6],"
        " 0.lora_b.weight is [9, 4] of int32, not [9, 4]"
    )
    assert all(map(torch.equal, mllama.lora_parameters(model), before))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"4.lora_b.weight": None}, "not in the file (1): 4.lora_b.weight"),
        ({"4.lora_a.weight": None}, "not in the model (1): 4.lora_b.weight"),
        ({"5.lora_a.weight": torch.zeros(4, 9)}, "not in the model (1): 5.lora_a.weight"),
        (
            {"0.lora_a.weight": torch.zeros(0, 6), "0.lora_b.weight": torch.zeros(9, 0)},
            "0.lora_a.weight is [0, 6]",
        ),
        ({"0.lora_a.weight": torch.zeros(())}, "0.lora_a.weight is []"),
        ({"0.lora_a.weight": torch.zeros(4, 7)}, "0.lora_a.weight is [4, 7]"),
        ({"0.lora_b.weight": torch.zeros(9, 5)}, "0.lora_b.weight is [9, 5]"),
        ({"0.lora_b.weight": torch.zeros(9, 4, dtype=torch.bool)}, "0.lora_b.weight is [9, 4]"),
        ({"0.lora_b.weight": torch.zeros(9, 4).to(torch.float8_e4m3fn)}, "[9, 4] of float8_e4m3fn"),
        (
            {"0.lora_b.weight": torch.full((9, 4), 1e39, dtype=torch.float64)},
            "not finite (1): 0.lora_b.weight",
        ),
        ({"0.lora_a.weight": None, "0.lora_b.weight": None}, "alphas of 0, but no tensors"),
        (dict.fromkeys(keys("0", "4")), "has no adapters: it has no tensors"),
    ],
)
def test_a_plain_model_stays_plain_where_something_does_not_fit(converted, path, changed, said):
    mllama.save_lora(converted(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(
        {
            name: tensor
            for name, tensor in (load_file(path) | changed).items()
            if tensor is not None
        },
        path,
        metadata,
    )
    model = plain()
    with pytest.raises(ValueError) as caught:
        mllama.load_lora(model, path)
    assert said in str(caught.value)
    assert not any(isinstance(part, Linear_LORA) for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "alpha",
    [
        "",
        "{",
        "[]",
        "16",
        '{"0": "16"}',
        '{"0": 0}',
        '{"0": -1}',
        '{"0": NaN}',
        '{"0": 1e39}',
        '{"0": 1e-45}',
        '{"0": Infinity}',
        '{"0": true}',
        '{"0": null}',
    ]
    + ['{"0": 1' + "0" * 400 + "}", '{"0": 1' + "0" * 5000 + "}", "[" * 100_000],
)
def test_metadata_that_cannot_be(converted, path, alpha):
    mllama.save_lora(converted(), path)
    save_file(load_file(path), path, {"alpha": alpha})
    for model in (plain(), converted()):
        with pytest.raises(ValueError, match="alphas"):
            mllama.load_lora(model, path)


def header(content: dict, data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


class Evil:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file of tensors",
        struct.pack("<Q", 2**62) + b"{}",
        header({"0.lora_a.weight": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]}}),
        header(
            {"0.lora_a.weight": {"dtype": "F32", "shape": [2**40, 6], "data_offsets": [0, 4]}},
            b"1234",
        ),
        header({"0.lora_a.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"),
        header(
            {"0.lora_a.weight": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}, b"1"
        ),
        pickle.dumps({"0.lora_a.weight": [1.0]}),
        b"PK\x05\x06" + bytes(18),
        b"PK\x03\x04" + bytes(18),
        b"PK\x06\x07" + b"\1" * 16 + b"PK\x05\x06" + bytes(18),
    ],
    ids=[
        "empty",
        "text",
        "endless header",
        "cut off",
        "too large",
        "small type",
        "odd type",
        "pickle",
        "empty zip",
        "zip",
        "two disks",
    ],
)
def test_broken_files(converted, tmp_path, content):
    path = tmp_path / "adapters.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="adapters.pth"):
        mllama.load_lora(converted(), path)


@pytest.mark.parametrize(
    "held",
    [
        Evil(),
        {"0.lora_a.weight": Evil()},
        [torch.zeros(1)],
        {"0.lora_a.weight": 3.0},
        {3: torch.zeros(1)},
    ],
)
def test_pickles_of_anything_but_tensors(converted, tmp_path, monkeypatch, held):
    monkeypatch.chdir(tmp_path)
    torch.save(held, "adapters.pth")
    with warnings.catch_warnings(), pytest.raises(ValueError, match="adapters.pth"):
        mllama.load_lora(converted(), "adapters.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.pth"]
