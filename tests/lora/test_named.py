"""Several adapters in one model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mllama
import tiny
from tiny.pairs import make

IDS = torch.tensor([tiny.tokens(6)])


def say(model: nn.Module, seed: int) -> None:
    """Let the adapter in use say something."""
    torch.manual_seed(seed)
    for parameter in mllama.lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def say_what(model: nn.Module, name: str | None) -> torch.Tensor:
    """The logits of an adapter."""
    with mllama.lora_active(model, name):
        return logits(model)


@pytest.fixture
def two():
    """A model with the adapters a (attention) and b (all of the decoder), b in use; the logits of
    each and of the base model.
    """
    model = tiny.model().eval()
    expected = {None: logits(model)}
    for seed, (name, targets) in enumerate((("a", "attn"), ("b", "all-linear"))):
        mllama.adapt(model, targets, rank=2 + seed, alpha=5, name=name)
        say(model, seed)
        expected[name] = logits(model)
    assert not any(
        torch.allclose(expected[one], expected[other], atol=1e-2)
        for one, other in (("a", "b"), ("a", None), ("b", None))
    )
    return model, expected


def test_the_active_one_alone_computes_and_is_trained(two):
    model, expected = two
    assert mllama.lora_names(model) == ["b", "a"]
    for name in ("a", "b", "a"):
        mllama.activate_lora(model, name)
        assert mllama.lora_names(model)[0] == name
        assert torch.equal(logits(model), expected[name])
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert trained == set(mllama.lora_parameters(model))
        model.train()(IDS, labels=IDS).loss.backward()
        model.eval()
        assert all(parameter.grad is not None for parameter in trained)
        model.zero_grad()


def test_contexts_nest_and_restore(two):
    model, expected = two
    frozen = model.language_model.layers[0].self_attn.q_proj.lora_a.weight.requires_grad_(False)
    with mllama.lora_active(model, "a"):
        assert torch.equal(logits(model), expected["a"])
        with mllama.lora_active(model, "b"), mllama.lora_active(model, None):
            assert torch.equal(logits(model), expected[None])
        assert torch.equal(logits(model), expected["a"])
    assert torch.equal(logits(model), expected["b"]) and not frozen.requires_grad
    with pytest.raises(RuntimeError, match="stop"), mllama.lora_active(model, "a"):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), expected["b"])


def in_thread(call):
    """What a call in another thread returns or raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_threads_take_turns(two):
    model, expected = two
    with mllama.lora_active(model, "b"):  # in use already: whoever needs it may come
        assert torch.equal(in_thread(lambda: say_what(model, "b")), expected["b"])
        calls = [lambda name=name: say_what(model, name) for name in ("a", None)]
        for call in (*calls, lambda: mllama.activate_lora(model, "a")):
            with pytest.raises(RuntimeError, match="another thread"):
                in_thread(call)
        assert torch.equal(logits(model), expected["b"])
    for context in (mllama.lora_active(model, "a"), mllama.lora_disabled(model)):
        with context, pytest.raises(RuntimeError, match="another thread"):
            in_thread(lambda: say_what(model, "b"))
    assert torch.equal(in_thread(lambda: say_what(model, "a")), expected["a"])
    assert torch.equal(logits(model), expected["b"])


def test_merging_is_of_the_active_one(two):
    model, expected = two
    mllama.activate_lora(model, "a")
    mllama.merge_lora(model)
    torch.testing.assert_close(logits(model), expected["a"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="merged"):
        mllama.activate_lora(model, "b")
    mllama.unmerge_lora(model)
    mllama.activate_lora(model, "b")
    assert torch.equal(logits(model), expected["b"])
    mllama.activate_lora(model, "a")
    merged = mllama.merge_and_unload(model)
    assert mllama.lora_names(merged) == []
    torch.testing.assert_close(logits(merged), expected["a"], rtol=1e-4, atol=1e-4)


def test_no_adapter_is_added_while_one_is_merged(two, tmp_path):
    model, expected = two
    mllama.save_lora(model, tmp_path / "b.safetensors")
    mllama.activate_lora(model, "a")
    mllama.merge_lora(model)
    model.language_model.norm.requires_grad_(True)
    for add in (
        lambda: mllama.adapt(model, "mlp", name="c"),
        lambda: mllama.adapt(model, "vision", name="c"),  # whose layers are not merged
        lambda: mllama.load_lora(model, tmp_path / "b.safetensors", name="c"),
        lambda: mllama.load_lora(model, tmp_path / "b.safetensors", name="b"),
        lambda: mllama.combine_lora(model, ["a", "b"], name="c"),
    ):
        with pytest.raises(ValueError, match=r"merged: call mllama\.unmerge_lora"):
            add()
        assert mllama.lora_names(model) == ["a", "b"]
        assert model.language_model.norm.weight.requires_grad, "not frozen"
    mllama.unmerge_lora(model)
    assert torch.equal(logits(model), expected["a"])


def test_deleting(two):
    model, expected = two
    with pytest.raises(ValueError, match="'b' is in use"):
        mllama.delete_lora(model, "b")
    mllama.activate_lora(model, "a")
    mllama.delete_lora(model, "b")
    assert mllama.lora_names(model) == ["a"] and torch.equal(logits(model), expected["a"])
    assert type(model.language_model.layers[0].mlp.up_proj) is nn.Linear
    mllama.delete_lora(model, "a")
    assert mllama.lora_names(model) == [] and torch.equal(logits(model), expected[None])


def test_deleting_an_inactive_one_whose_layers_have_it_in_their_slot():
    model = tiny.model().eval()
    mllama.adapt(model, "attn", name="a")
    mllama.adapt(model, "mlp", name="b")
    mllama.adapt(model, "mlp", name="c")
    say(model, 0)
    expected = logits(model)
    mllama.activate_lora(model, "a")  # the layers of the feed-forward blocks keep c in place
    mllama.delete_lora(model, "c")
    assert set(mllama.lora_names(model)) == {"a", "b"}
    mllama.activate_lora(model, "b")
    assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("weights", [None, [0.5, -2.0], [0, 1]])
def test_combining_is_the_sum_of_the_updates(two, weights):
    model, expected = two
    factors = weights or [1, 1]
    mllama.combine_lora(model, ["a", "b"], weights, name="sum")
    combined = logits(model)
    by_hand = tiny.model().eval()
    for name, layer in model.named_modules():
        if isinstance(layer, mllama.Linear_LORA):
            own = layer.adapters()
            assert own["sum"].rank == sum(own[each].rank for each in ("a", "b") if each in own)
            update = sum(
                factor
                * own[each].alpha
                / own[each].rank
                * own[each].lora_b.weight
                @ own[each].lora_a.weight
                for each, factor in zip(("a", "b"), factors, strict=True)
                if each in own
            )
            by_hand.get_submodule(name).weight.data += update.detach()
    torch.testing.assert_close(combined, logits(by_hand), rtol=1e-4, atol=1e-4)
    for name in ("a", "b"):
        mllama.activate_lora(model, name)
        assert torch.equal(logits(model), expected[name])


def test_combining_what_does_not_add_up_is_refused(two):
    model, _ = two
    mllama.adapt(model, "attn", dora=True, name="dora")
    for names, weights, said in (
        (["a", "dora"], None, "dora has magnitudes"),
        (["a", "a"], None, "names"),
        ([], None, "names"),
        ("a", None, "names"),
        (["a", "z"], None, "'z'"),
        (["a", "b"], [1], "weights"),
        (["a", "b"], [1, float("nan")], "finite"),
    ):
        with pytest.raises(ValueError, match=said):
            mllama.combine_lora(model, names, weights)
    with pytest.raises(ValueError, match="'b' already"):
        mllama.combine_lora(model, ["a"], name="b")
    assert set(mllama.lora_names(model)) == {"a", "b", "dora"}


def test_what_is_trained_beside_stays_so_when_another_is_added(two):
    model, _ = two
    model.multi_modal_projector.requires_grad_(True)
    mllama.combine_lora(model, ["a", "b"])
    assert all(each.requires_grad for each in model.multi_modal_projector.parameters())
    trained = {each for each in model.language_model.parameters() if each.requires_grad}
    assert trained == set(mllama.lora_parameters(model))


def test_a_state_dict_fits_whichever_is_in_use(two):
    model, expected = two
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = tiny.model().eval()
    for name, targets, rank in (("b", "all-linear", 3), ("a", "attn", 2)):
        mllama.adapt(other, targets, rank=rank, alpha=5, name=name)
    other.load_state_dict(state)
    for name in ("a", "b"):
        mllama.activate_lora(other, name)
        assert torch.equal(logits(other), expected[name])


@pytest.mark.parametrize("format", ["mllama", "peft"])
def test_each_is_saved_and_loaded_by_name(two, format, tmp_path):
    model, expected = two
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b")}
    for name, path in paths.items():
        path = paths[name] = path.with_suffix("") if format == "peft" else path
        mllama.save_lora(model, path, format, name=name)
    again = tiny.model().eval()
    for name, path in paths.items():
        mllama.load_lora(again, path, name=name)
        assert torch.equal(logits(again), expected[name])
    mllama.load_lora(again, paths["a"], name="a")  # over itself, and in use
    assert mllama.lora_names(again) == ["a", "b"] and torch.equal(logits(again), expected["a"])
    with pytest.raises(ValueError, match="do not fit"):
        mllama.load_lora(again, paths["b"])  # into the one in use


@pytest.mark.parametrize("names", [("default", "other"), ("one", "two")])
def test_folders_of_several(names, model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = mllama.load(model_folder, dtype="float32", device="cpu")
    expected = {}
    for seed, name in enumerate(names):
        mllama.adapt(model, "attn" if seed else "mlp", name=name)
        say(model, seed)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    there = {
        path.parent.relative_to(tmp_path).name for path in tmp_path.rglob("adapter_config.json")
    }
    assert there == {"" if name == "default" else name for name in names}
    (tmp_path / "checkpoint-3").mkdir()  # a Trainer's is no adapter of the folder
    for file in (tmp_path / names[1]).iterdir():
        (tmp_path / "checkpoint-3" / file.name).write_bytes(file.read_bytes())
    kinds = (
        lambda: mllama.load(tmp_path, dtype="float32", device="cpu")[0],
        lambda: type(model).from_pretrained(tmp_path),
    )
    for load in kinds:
        again = load()
        assert mllama.lora_names(again) == [*names]
        for name in names:
            mllama.activate_lora(again, name)
            assert torch.equal(logits(again), expected[name])
    if names[0] == "default":
        plain, _ = mllama.load(model_folder, dtype="float32", device="cpu")
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
        torch.testing.assert_close(logits(theirs), expected["default"], rtol=1e-4, atol=1e-4)


def test_modules_trained_in_full_belong_to_all(tmp_path, model_folder):
    model, _ = mllama.load(model_folder, dtype="float32", device="cpu")
    mllama.adapt(model, "attn", trained_modules="projector")
    with torch.no_grad():
        next(model.multi_modal_projector.parameters()).add_(1)
    mllama.save_lora(model, tmp_path, format="peft")
    again, _ = mllama.load(model_folder, dtype="float32", device="cpu")
    mllama.adapt(again, "mlp", name="first")
    with pytest.raises(ValueError, match="multi_modal_projector.*first"):
        mllama.load_lora(again, tmp_path, name="second")
    assert mllama.lora_names(again) == ["first"]
    mllama.delete_lora(again, "first")
    mllama.load_lora(again, tmp_path, name="second")


def test_unknown_names_and_other_types_are_refused(two):
    model, _ = two
    for call in (
        lambda: mllama.activate_lora(model, "z"),
        lambda: mllama.delete_lora(model, "z"),
        lambda: mllama.save_lora(model, "x.safetensors", name="z"),
    ):
        with pytest.raises(ValueError, match="'z'"):
            call()
    with pytest.raises(ValueError, match="'a' already"):
        mllama.adapt(model, "attn", name="a")
    with pytest.raises(TypeError, match="name"):
        mllama.activate_lora(model, 3)
    with pytest.raises(ValueError, match="no LoRA layers"):
        mllama.activate_lora(tiny.model(), "a")


def test_older_scripts_see_the_one_in_use(two):
    model, _ = two
    layer = model.language_model.layers[0].self_attn.q_proj
    assert (layer.rank, layer.lora_a.weight.shape[0], layer.scale) == (3, 3, 5 / 3)
    mllama.activate_lora(model, "a")
    assert (layer.rank, layer.lora_a.weight.shape[0], layer.scale) == (2, 2, 5 / 2)
    assert {key for key in layer.state_dict() if "inactive" not in key} == {
        "linear.weight",
        "lora_a.weight",
        "lora_b.weight",
    }


def test_every_kind_of_model_is_converted_in_parts_under_the_name_in_use():
    model = make("llama").ours
    mllama.adapt(model, "attn", name="a")
    mllama.convert_linears_to_lora(model.language_model, target_module_names=["up_proj"])
    assert mllama.lora_names(model) == ["a"]
