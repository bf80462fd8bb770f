"""`--adapter` of `ask`, `chat` and `generate`."""

import pytest
import torch

import mllama


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
