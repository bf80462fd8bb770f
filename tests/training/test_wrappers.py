"""Names of wrapped modules in one process; tests/training/test_distributed.py has two."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mllama
import tiny
from mllama import MllamaForConditionalGeneration


def inner_wrapped() -> MllamaForConditionalGeneration:
    """Every layer of the decoder in a wrapper, and one more."""
    model = tiny.model()
    for index, layer in enumerate(model.language_model.layers):
        model.language_model.layers[index] = checkpoint_wrapper(
            torch.compile(layer, backend="eager")
        )
    return model


def compiled() -> nn.Module:
    return torch.compile(tiny.model(), backend="eager")


@pytest.mark.parametrize("wrapped", [inner_wrapped, compiled])
@pytest.mark.parametrize("reverse", [False, True])
def test_adapters_of_wrapped_models(wrapped, reverse, tmp_path):
    source, target = (tiny.model(), wrapped()) if reverse else (wrapped(), tiny.model())
    source.requires_grad_(False)
    for layer in mllama.convert_linears_to_lora(source, 2, target_module_names=["q_proj"]).values():
        nn.init.normal_(layer.lora_b.weight)
    ids = torch.tensor([tiny.tokens(5)])
    for format in ("mllama", "peft"):
        mllama.save_lora(source, tmp_path / format, format=format)
        mllama.load_lora(target, tmp_path / format)  # the second time onto a converted one
        with torch.no_grad():
            assert torch.equal(target(ids).logits, source(ids).logits)
    plain = {f"{name}.{part}.weight" for name in names_of(source) for part in ("lora_a", "lora_b")}
    assert set(load_file(tmp_path / "mllama")) == plain and all(
        "_orig_mod" not in name for name in plain
    )


def names_of(model: nn.Module) -> list[str]:
    found = [name for name, layer in model.named_modules() if isinstance(layer, mllama.Linear_LORA)]
    return [
        name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for name in found
    ]


def equal(model: nn.Module) -> bool:
    """To the models here before they were wrapped."""
    ids = torch.tensor([tiny.tokens(5)])
    with torch.no_grad():
        return torch.equal(model(ids).logits, tiny.model()(ids).logits)


def emptied(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def test_whole_models_of_wrapped_ones(tmp_path):
    model, plain = inner_wrapped(), tiny.model()
    state = {
        f"module._orig_mod.{name}": tensor
        for name, tensor in torch.compile(model).state_dict().items()
    }
    for given in (state, model.state_dict(), plain.state_dict()):
        for target in (tiny.model(seed=4), emptied(inner_wrapped())):
            target.load_state_dict(given)
            assert equal(target)
    tiny.model(seed=4).save_pretrained(tmp_path / "given", state_dict=state)
    for name, saved in {"inner": model, "compiled": torch.compile(model)}.items():
        saved.save_pretrained(tmp_path / name)
    assert all(
        equal(MllamaForConditionalGeneration.from_pretrained(tmp_path / name))
        for name in ("given", "inner", "compiled")
    )


def test_files_with_wrappers_names_are_read(tmp_path):
    """As other versions and other tools wrote them."""
    model = tiny.model().requires_grad_(False)
    made = mllama.convert_linears_to_lora(model.language_model, 2, target_module_names=["q_proj"])
    for layer in made.values():
        nn.init.normal_(layer.lora_b.weight)
    mllama.save_lora(model, tmp_path / "plain.safetensors")
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        save_file(
            {
                prefix + name: tensor
                for name, tensor in load_file(tmp_path / "plain.safetensors").items()
            },
            tmp_path / "file.safetensors",
        )
        again = tiny.model()
        mllama.convert_linears_to_lora(again.language_model, 2, target_module_names=["q_proj"])
        mllama.load_lora(again, tmp_path / "file.safetensors")
        for one, two in zip(
            mllama.lora_parameters(again), mllama.lora_parameters(model), strict=True
        ):
            assert torch.equal(one, two)


def test_a_part_that_is_really_called_module(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"module": nn.ModuleDict({"module": nn.Linear(3, 4)}), "linear": nn.Linear(3, 4)}
        )

    model = make()
    for layer in mllama.convert_linears_to_lora(model).values():
        nn.init.normal_(layer.lora_b.weight)
    mllama.save_lora(model, tmp_path / "file.safetensors")
    assert "module.module.lora_a.weight" in load_file(tmp_path / "file.safetensors")
    again = make()
    mllama.load_lora(again, tmp_path / "file.safetensors")
    x = torch.randn(2, 3)
    assert torch.equal(again["module"]["module"](x), model["module"]["module"](x))
