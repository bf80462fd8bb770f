"""`--adapter` of `ask`, `chat`, `generate`, `quantize`, `inspect` and `verify`."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllama
from helpers import needs_kernels
from mllama.cli import build_parser
from mllama.hf import stock


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    """A folder with both formats of one model's adapters; that model and its processor."""
    model, processor = mllama.load(model_folder, dtype="float32", device="cpu")
    model.requires_grad_(False)
    torch.manual_seed(0)
    for layer in mllama.convert_linears_to_lora(model.language_model, 2, 8).values():
        torch.nn.init.normal_(layer.lora_b.weight, std=0.5)
    folder = tmp_path_factory.mktemp("adapters")
    mllama.save_lora(model, folder / "own.safetensors")
    mllama.save_lora(model, folder / "peft", format="peft")
    return folder, model, processor


def test_every_command_that_answers_takes_them(run, options, loaded, image_file, adapters):
    folder, *adapted = adapters
    expected, plain = (
        mllama.ask(image_file, "How many?", *each, max_new_tokens=8) for each in (adapted, loaded)
    )
    assert expected != plain
    calls = {
        "ask": (["ask", image_file, "How many?"], {}),
        "chat": (["chat", image_file], {"stdin": "How many?\n"}),
        "generate": (["generate", "--prompt", "How many?", "--image", image_file], {}),
    }
    for name, (arguments, more) in calls.items():
        given = [
            option.replace("--model", "--model-id")
            if name == "generate" and isinstance(option, str)
            else option
            for option in options
        ]
        for path in ("own.safetensors", "peft", "peft/adapter_model.safetensors"):
            code, out, _ = run(*arguments, *given, "--adapter", folder / path, **more)
            assert code == 0 and out.strip() == expected


def test_a_folder_of_adapters_names_its_model(run, options, image_file, adapters):
    folder, *adapted = adapters
    code, out, _ = run("ask", image_file, "How many?", "--model", folder / "peft", *options[2:])
    assert (code, out.strip()) == (
        0,
        mllama.ask(image_file, "How many?", *adapted, max_new_tokens=8),
    )


def test_what_cannot_be_is_said(run, options, image_file, adapters, model_folder):
    folder, *_ = adapters
    for arguments in (
        ["ask", image_file, "How many?", "--model", folder / "own.safetensors"],
        [
            "generate",
            "--prompt",
            "a",
            "--model-id",
            model_folder,
            "--runtime",
            "transformers",
            "--adapter",
            folder / "peft",
        ],
    ):
        code, _, err = run(*arguments)
        assert code == 2 and "--adapter" in err
    code, _, err = run("ask", image_file, "How many?", *options, "--adapter", model_folder)
    assert code == 2 and "no adapters" in err
    with pytest.raises(TypeError, match="adapter"):
        mllama.load(model_folder, adapter=3)
    with pytest.raises(ValueError, match="adapter"):
        mllama.load(folder / "peft", adapter=folder / "own.safetensors")


@pytest.fixture
def scaled(adapters, tmp_path):
    """The adapter's file with a larger first update: values that do not belong to the other one."""
    path, metadata = tmp_path / "scaled.safetensors", {}
    with open(adapters[0] / "own.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    tensors = load_file(adapters[0] / "own.safetensors")
    last = "layers.1.self_attn.v_proj.lora_b.weight"
    name = next(name for name in tensors if name.endswith(last))
    tensors[name] = 3 * tensors[name] + 1
    save_file(tensors, path, metadata)
    return path


@needs_kernels
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantize_packs_merged_weights(run, model_folder, adapters, tmp_path, calibrated):
    given = ["--dtype", "float32", "--adapter", adapters[0] / "peft"]
    (tmp_path / "text.txt").write_text("how many circles are there? three. what color? red. " * 20)
    text = ["--text", tmp_path / "text.txt"]
    text += ["--calibrate", tmp_path / "text.txt"] * calibrated
    assert run("convert", model_folder, tmp_path / "merged", "--to", "hf", *given)[0] == 0
    reports = []
    for source, target, more in (
        (model_folder, "packed", given),
        (tmp_path / "merged", "packed later", []),
    ):
        code, out, err = run("quantize", source, tmp_path / target, *text, *more, "--json")
        assert code == 0, err
        reports.append(json.loads(out))
    one, other = (load_file(tmp_path / name / "packed.safetensors") for name in ("packed", target))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert reports[0]["logits"] == reports[1]["logits"]  # compared with the merged model
    assert reports[0]["logits"]["mean_error"] > 0


def test_what_quantize_cannot_merge(run, model_folder, adapters, monkeypatch, tmp_path):
    given = ["quantize", model_folder, tmp_path / "out", "--no-report", "--adapter"]
    code, _, err = run(*given, adapters[0] / "peft", "--weights", "file")
    assert code == 2 and "weights" in err and "adapter" in err
    code, _, err = run(*given, model_folder)
    assert code == 2 and "no adapters" in err
    check = mllama.lora.layer.Linear_LORA.check_mergeable

    def hooked(layer, name: str) -> None:
        layer.linear.register_forward_hook(lambda *args: None)
        check(layer, name)

    monkeypatch.setattr(mllama.lora.layer.Linear_LORA, "check_mergeable", hooked)
    code, _, err = run(*given, adapters[0] / "peft")
    assert code == 2 and "self_attn.q_proj cannot be merged" in err
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_it_adapts(run, model_folder, family_folder, adapters):
    folder, model, _ = adapters
    plain = json.loads(run("inspect", model_folder, "--json")[1])
    added = sum(one.numel() for one in mllama.lora_parameters(model))
    layers = len(mllama.lora.layer.lora_layers(model))
    for path in (folder / "own.safetensors", folder / "peft"):
        code, out, _ = run("inspect", model_folder, "--json", "--adapter", path)
        found = json.loads(out)
        assert code == 0 and plain["adapter"] is None and found["adapter"]["fits"] is True
        assert found["adapter"]["parts"] == {"decoder": {"layers": layers, "parameters": added}}
        assert found["parameters"] == plain["parameters"]
        assert found["memory"]["total"] == plain["memory"]["total"] + 4 * added
        code, out, _ = run("inspect", model_folder, "--adapter", path)
        assert code == 0 and f"decoder, {layers} layers" in out and f"{added:,}" in out
    other = ["inspect", family_folder("gemma"), "--adapter", folder / "peft"]
    code, out, _ = run(*other)
    assert code == 1 and "does not fit" in out
    code, out, _ = run(*other, "--json")
    assert code == 1 and json.loads(out)["adapter"]["parts"] == {}
    assert run("inspect", model_folder, "--adapter", model_folder)[0] == 2


def test_verify_compares_with_peft(run, model_folder, adapters, scaled, monkeypatch):
    pytest.importorskip("peft")
    given = ["verify", model_folder, "--json", "--adapter"]
    for path, *more in (
        (adapters[0] / "own.safetensors",),
        (adapters[0] / "peft", "--dtype", "bfloat16"),
    ):
        code, out, err = run(*given, path, *more)
        found = json.loads(out)
        assert code == 0 and found["against"].endswith(" and PEFT"), err
        assert {row["stage"] for row in found["checks"]} >= {"layer 0", "layer 1", "logits"}
    monkeypatch.setattr("mllama.cli.verify.load_lora", lambda model, path: None)
    code, out, _ = run(*given, path)  # as if ours were not adapted
    wrong = [row["stage"] for row in json.loads(out)["checks"] if not row["ok"]]
    assert code == 1 and wrong == ["layer 0", "layer 1", "logits"]
    other = lambda model, path: mllama.load_lora(model, scaled)  # noqa: E731
    monkeypatch.setattr("mllama.cli.verify.load_lora", other)
    wrong = [row["stage"] for row in json.loads(run(*given, path)[1])["checks"] if not row["ok"]]
    assert wrong == ["layer 1", "logits"]


def test_verify_needs_an_adapter_that_fits(run, family_folder, adapters, monkeypatch, tmp_path):
    monkeypatch.setattr("mllama.cli.verify.load_stock", lambda *args: pytest.fail("it ran"))
    code, out, err = run("verify", family_folder("gemma"), "--adapter", adapters[0] / "peft")
    assert (code, out) == (2, "") and "do not fit" in err
    monkeypatch.undo()
    siglip, _ = mllama.load(family_folder("siglip"), dtype="float32", device="cpu")
    mllama.adapt(siglip, "vision", rank=2)
    mllama.save_lora(siglip, tmp_path / "a.safetensors")
    given = ["verify", family_folder("siglip"), "--adapter", tmp_path / "a.safetensors"]
    code, out, err = run(*given)  # stock SigLIP has other names
    assert (code, out) == (2, "") and "nothing to be compared with" in err
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        stock.adapt_stock(None, adapters[0] / "peft")


def test_every_command_that_reads_weights_has_the_option():
    commands = build_parser()._subparsers._group_actions[0].choices
    without = {
        name
        for name, command in commands.items()
        if not any("--adapter" in action.option_strings for action in command._actions)
    }
    assert without == {"download", "info", "inspect-labels", "lora"}  # lora names them by place
