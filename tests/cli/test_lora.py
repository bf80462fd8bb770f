"""`mllama lora merge|convert|inspect`, and several adapters in `chat`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mllama
import tiny
from cli.test_options import Recorder
from mllama.cli import _parser

IDS = torch.tensor([tiny.tokens(5)])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    """A model with an adapter, its base model, and files of both formats."""
    model, _ = mllama.load(model_folder, dtype="float32", device="cpu")
    base, _ = mllama.load(model_folder, dtype="float32", device="cpu")
    mllama.adapt(model, "attn", rank=2, alpha=6, ranks={"q_proj": 3})
    torch.manual_seed(0)
    for parameter in mllama.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapters")
    mllama.save_lora(model, folder / "own.safetensors")
    mllama.save_lora(model, folder / "peft", format="peft")
    return model, base, folder


def test_merged(run, model_folder, adapters, tmp_path):
    model, base, folder = adapters
    for number, adapter in enumerate(("own.safetensors", "peft")):
        out = tmp_path / str(number)
        code, text, _ = run(
            "lora", "merge", model_folder, folder / adapter, out, "--dtype", "float32"
        )
        assert (code, text) == (0, f"{out}: the llava in float32 with {folder / adapter} merged\n")
        merged, _ = mllama.load(out, dtype="float32", device="cpu")
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(base), atol=1e-2)
    code, text, error = run("lora", "merge", model_folder, folder / "peft", out)
    assert code == 2 and "exists and is not empty" in error and not text
    code, text, _ = run("lora", "merge", model_folder, folder / "peft", out, "--force", "--json")
    assert code == 0 and json.loads(text)["family"] == "llava"


def test_merging_into_packed_weights_is_refused(run, model_folder, adapters, tmp_path):
    mllama.quantize(model_folder, tmp_path / "packed", "int8", report=False)
    code, _, error = run(
        "lora", "merge", tmp_path / "packed", adapters[2] / "peft", tmp_path / "out"
    )
    assert code == 2 and "packed weights" in error and not (tmp_path / "out").exists()


def test_merging_what_float16_cannot_hold_is_refused(run, model_folder, adapters, tmp_path):
    tensors = load_file(adapters[2] / "peft/adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.lora_B.weight"))
    shutil.copytree(adapters[2] / "peft", tmp_path / "large")
    tensors[name] *= 1e6
    save_file(tensors, tmp_path / "large/adapter_model.safetensors")
    given = ["lora", "merge", model_folder, tmp_path / "large", tmp_path / "out", "--dtype"]
    code, text, error = run(*given, "float16")
    assert code == 2 and not text and not (tmp_path / "out").exists()
    assert "o_proj.weight with its adapter merged has values beyond float16" in error
    assert run(*given, "bfloat16")[0] == 0


def test_converted_there_and_back(run, model_folder, adapters, tmp_path):
    *_, folder = adapters
    given = ["--model", model_folder]
    own, peft = tmp_path / "own.safetensors", tmp_path / "peft"
    assert run("lora", "convert", folder / "peft", own, "--to", "mllama", *given)[0] == 0
    assert run("lora", "convert", folder / "own.safetensors", peft, "--to", "peft", *given)[0] == 0
    for found, expected in (
        (own, folder / "own.safetensors"),
        (peft / "adapter_model.safetensors", folder / "peft/adapter_model.safetensors"),
    ):
        found, expected = load_file(found), load_file(expected)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    configs = [
        json.loads((each / "adapter_config.json").read_text()) for each in (peft, folder / "peft")
    ]
    assert configs[0] | {"base_model_name_or_path": 0} == configs[1] | {
        "base_model_name_or_path": 0
    }
    named = tmp_path / "named.safetensors"  # as transformers names layers, without the model
    code, text, _ = run("lora", "convert", folder / "peft", named, "--to", "mllama", "--json")
    assert code == 0 and json.loads(text)["layers"] == 8
    base, _ = mllama.load(model_folder, dtype="float32", device="cpu", adapter=named)
    assert torch.equal(logits(base), logits(adapters[0]))


def with_embeddings(model, source, folder):
    """A PEFT folder that has the frozen embeddings, too, as PEFT writes them where words were
    added.
    """
    shutil.copytree(source, folder)
    name, value = next(
        (name, value) for name, value in model.named_parameters() if "embed_tokens" in name
    )
    key = f"base_model.model.{model.stock_name(name)}"
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {key: value.detach() * 2}, path)
    return folder


def test_embeddings_beside_an_adapter_are_kept(run, model_folder, adapters, tmp_path):
    model, _, folder = adapters
    source = with_embeddings(model, folder / "peft", tmp_path / "resized")
    given = ["--to", "peft", "--model", model_folder]
    assert run("lora", "convert", source, tmp_path / "peft", *given)[0] == 0
    found, expected = (
        mllama.load(model_folder, dtype="float32", device="cpu", adapter=path)[0]
        for path in (tmp_path / "peft", source)
    )
    assert torch.equal(logits(found), logits(expected))
    assert not torch.allclose(logits(found), logits(model), atol=1e-2)
    assert not found.get_input_embeddings().weight.requires_grad


def test_what_cannot_be_converted(run, model_folder, adapters, tmp_path):
    model, _, folder = adapters
    full, _ = mllama.load(model_folder, dtype="float32", device="cpu")
    mllama.adapt(full, "attn", trained_modules="projector")
    mllama.save_lora(full, tmp_path / "full", format="peft")
    resized = with_embeddings(model, folder / "peft", tmp_path / "resized")
    for arguments, said in (
        ([folder / "own.safetensors", tmp_path / "x", "--to", "peft"], "--model"),
        ([folder / "peft", tmp_path / "x.bin", "--to", "mllama"], ".safetensors"),
        ([folder / "peft", folder / "own.safetensors", "--to", "mllama"], "--force"),
        ([folder / "peft", folder, "--to", "mllama"], "must be a file"),
        ([tmp_path / "full", tmp_path / "x.safetensors", "--to", "mllama"], "has in full"),
        ([resized, tmp_path / "x.safetensors", "--to", "mllama"], "no place for"),
        ([model_folder, tmp_path / "x.safetensors", "--to", "mllama"], "whole model"),
    ):
        code, text, error = run("lora", "convert", *arguments)
        assert code == 2 and said in error and error.count("\n") == 1 and not text
    assert {path.name for path in tmp_path.iterdir()} == {"full", "resized"}


def test_inspected(run, model_folder, adapters, tmp_path):
    *_, folder = adapters
    code, text, _ = run("lora", "inspect", folder / "peft", "--json", "--model", model_folder)
    found = json.loads(text)
    assert code == 0 and found["fits"] is True and found["base"] == str(model_folder)
    assert (found["format"], found["layers"], found["dora"]) == ("peft", 8, False)
    assert found["ranks"] == {"2": 6, "3": 2} and found["alphas"] == {"6": 8}
    assert found["bytes"] == 4 * found["parameters"] and found["dtype"] == "float32"
    assert [name.rpartition(".")[2] for name in found["targets"]] == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]
    code, text, _ = run("lora", "inspect", folder / "own.safetensors")
    assert code == 0 and "base model not named" in text and "ranks: 2 (6), 3 (2)" in text
    tiny.model().save_pretrained(tmp_path)  # of other sizes
    code, text, _ = run("lora", "inspect", folder / "peft", "--model", tmp_path)
    assert (code == 1) == ("does not fit" in text)


@pytest.mark.parametrize(
    "change", ["truncated", "other shape", "not finite", "integers", "no half"]
)
def test_hostile_files_are_one_line(run, adapters, model_folder, tmp_path, change):
    *_, folder = adapters
    path = tmp_path / "hostile.safetensors"
    source = folder / "own.safetensors"
    if change == "truncated":
        path.write_bytes(source.read_bytes()[:-100])
    else:
        tensors = load_file(source)
        name = next(name for name in tensors if name.endswith("lora_a.weight"))
        tensors[name] = {
            "other shape": tensors[name].repeat(1, 2),
            "not finite": tensors[name].clone().fill_(float("nan")),
            "integers": tensors[name].long(),
            "no half": None,
        }[change]
        tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        layers = {key.rpartition(".lora_")[0]: 6.0 for key in tensors}
        save_file(tensors, path, {"format": "pt", "alpha": json.dumps(layers)})
    out = tmp_path / "out"
    code, text, error = run("lora", "merge", model_folder, path, out)
    assert code == 2 and error.count("\n") == 1 and not text and not out.exists()
    code, text, error = run("lora", "inspect", path, "--model", model_folder)
    assert (code, error.count("\n")) in ((1, 0), (2, 1)) and "Traceback" not in error
    code, _, error = run(
        "ask", "--model", model_folder, "--adapter", path, "Hello", "--device", "cpu"
    )
    assert code == 2 and error.count("\n") == 1


def test_adapters_by_name_in_a_chat(run, options, adapters, image_file):
    model, base, folder = adapters
    given = [
        "--adapter",
        f"one={folder / 'own.safetensors'}",
        "--adapter",
        f"two={folder / 'peft'}",
    ]
    stdin = "How many?\n/adapter two\nHow many?\n/adapter three\n/adapter\n"
    code, text, error = run("chat", image_file, *options, *given, stdin=stdin)
    assert code == 0 and text.count("\n") == 2
    assert "answers come from the adapter two" in error and "no adapter 'three'" in error
    assert "/adapter takes a NAME" in error
    code, _, error = run("chat", *given, "--adapter", "x.safetensors")
    assert code == 2 and "different names" in error


def test_converted_with_an_adapter(run, model_folder, adapters, tmp_path):
    model, _, folder = adapters
    given = ["--to", "hf", "--dtype", "float32", "--adapter", folder / "peft"]
    assert run("convert", model_folder, tmp_path / "out", *given)[0] == 0
    found, _ = mllama.load(tmp_path / "out", dtype="float32", device="cpu")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("merge", ["MODEL", "peft", "OUT"]),
        ("convert", ["peft", "OUT.safetensors", "--to", "mllama"]),
        ("inspect", ["peft"]),
    ],
)
def test_every_option_is_read(run, model_folder, adapters, monkeypatch, tmp_path, task, words):
    folder, recorded, parse = adapters[2], [], _parser.Parser.parse_args

    def record(self, *args):
        recorded.append(Recorder(parse(self, *args)))
        return recorded[-1]

    monkeypatch.setattr(_parser.Parser, "parse_args", record)
    given = {"MODEL": model_folder, "peft": folder / "peft"}
    given |= {word: tmp_path / word for word in words if word.startswith("OUT")}
    assert run("lora", task, *(given.get(word, word) for word in words))[0] == 0
    tasks = _parser.build_parser()._subparsers._group_actions[0].choices["lora"]
    parser = tasks._subparsers._group_actions[0].choices[task]
    options = {action.dest for action in parser._actions} - {"help"}
    assert options and options - recorded[0].read == set()
