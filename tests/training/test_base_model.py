"""`base_model`: the model without its head, as transformers' classes have it."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import peft
import pytest
import torch
from torch import nn

import mllama
import tiny
from families.test_training import examples
from tiny.pairs import make, pair

LORA = peft.LoraConfig(target_modules=["q_proj"])


def without_labels(case: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in examples(pair(case)).items() if name != "labels"}


@pytest.mark.parametrize("case", ["llama", "gemma", "llava, siglip, several", "paligemma"])
def test_last_hidden_state_equals_transformers(case):
    both, batch = pair(case), without_labels(case)
    seen = batch["attention_mask"] == 1
    with torch.no_grad():
        ours, theirs = (model.base_model(**batch, use_cache=False) for model in both)
        logits = both.ours(**batch).logits
    torch.testing.assert_close(
        ours.last_hidden_state[seen], theirs.last_hidden_state[seen], rtol=1e-4, atol=1e-4
    )
    assert ours.cache is None
    torch.testing.assert_close(both.ours.lm_head(ours.last_hidden_state), logits)
    assert isinstance(both.ours.model(**batch, return_dict=False), tuple)


def test_of_prepended_images_the_text_is_returned():
    model = tiny.model(fusion="prepend", image_token_index=None)
    ids = torch.tensor([tiny.tokens(6)])
    with torch.no_grad():
        states = model.base_model(ids, pixel_values=tiny.images(1)).last_hidden_state
        logits = model(ids, pixel_values=tiny.images(1)).logits
    assert states.shape[1] == 6 < logits.shape[1]
    torch.testing.assert_close(model.lm_head(states), logits[:, -6:])


def test_it_holds_the_models_own_modules():
    model = make("llava, siglip, several").ours
    base = model.base_model
    assert base is model.model is getattr(model, model.base_model_prefix)
    names = {name for name, _ in model.named_parameters()}
    assert not any(name.startswith("model.") for name in names | set(model.state_dict()))
    assert {name for name, _ in base.named_parameters()} == names - {"lm_head.weight"}
    for parameter in base.parameters():
        parameter.requires_grad = False
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "lm_head.weight"
    ]
    assert (
        base.config is model.config
        and base.dtype == model.dtype
        and base.get_input_embeddings() is model.get_input_embeddings()
    )
    assert model.get_decoder() is model.language_model
    model.language_model = wrapped = torch.compile(model.language_model, backend="eager")
    assert model.base_model.language_model is wrapped
    assert not model.eval().base_model.training and model.train().base_model.training


def test_its_children_are_replaced_in_the_model():
    model, ids = make("llama").ours, torch.tensor([tiny.tokens(4)])
    base, other = model.model, make("llama", seed=1).ours.language_model
    base.language_model = other
    assert model.language_model is other is model.model.language_model
    base.add_module("probe", nn.Linear(64, 2))
    base.other = nn.Linear(2, 2)
    assert {"probe.weight", "other.weight"} <= model.state_dict().keys()
    del base.probe, base.other
    assert torch.equal(base(ids).last_hidden_state, other(ids).last_hidden_state)
    assert [name for name, _ in model.named_children()] == ["language_model", "lm_head"]


@pytest.mark.parametrize("name", ["model", "base_model"])
def test_it_is_not_replaced(name):
    model = make("llama").ours
    for other in (torch.compile(model.model, backend="eager"), nn.Identity(), None):
        with pytest.raises(AttributeError, match=f"{name} is a view"):
            setattr(model, name, other)
    model.model = model.model
    assert [child for child, _ in model.named_children()] == ["language_model", "lm_head"]


def test_copies_have_their_own():
    model = make("llama").ours
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        nn.init.zeros_(other.language_model.norm.weight)
        ids = torch.tensor([tiny.tokens(4)])
        assert (
            not other.base_model(ids).last_hidden_state.any()
            and model.base_model(ids).last_hidden_state.any()
        )


def test_hooks_stay():
    model, seen = make("llama").ours, []
    ids = torch.tensor([tiny.tokens(4)])
    model.model.register_forward_hook(lambda *args: seen.append(1))
    model.model(ids)
    copy.deepcopy(model).model(ids)
    assert seen == [1, 1]


def test_it_outlives_its_model():
    model, ids = make("llama").ours, torch.tensor([tiny.tokens(4)])
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        base = pickle.loads(pickle.dumps(copy.deepcopy(model.model)))
        del model
        assert torch.equal(base(ids).last_hidden_state, expected)


def train(model, batch):
    mllama.adapt(model, rank=2)
    model(**batch).loss.backward()


@pytest.mark.parametrize(
    "use",
    [
        lambda model, batch: model.model,
        lambda model, batch: model.generate(batch["input_ids"], max_new_tokens=2),
        lambda model, batch: model.generate(
            batch["input_ids"][:1], max_new_tokens=4, prompt_lookup_num_tokens=2
        ),
        lambda model, batch: model.generate(
            batch["input_ids"][:1], max_new_tokens=4, assistant_model=make("llama", seed=1).ours
        ),
        lambda model, batch: peft.get_peft_model(model, LORA)(**batch),
        train,
    ],
)
def test_a_deleted_model_is_freed_at_once(use):
    model, batch = make("llama").ours, examples(pair("llama"))
    alive = weakref.ref(model)
    gc.disable()
    try:
        use(model, batch)
        del model
        assert alive() is None
    finally:
        gc.enable()


FREED = """
import gc, weakref
import mllama

gc.disable()
def load():
    return weakref.ref(mllama.load()[0])
print(load()() is None)
"""


def test_the_first_loaded_model_is_freed_at_once():
    """Imports leave cycles behind."""
    output = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert output.stdout == "True\n", output.stderr


def test_it_compiles_in_one_graph():
    model, batch = make("llama").ours, without_labels("llama")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def states(ids, mask):
        return model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state

    with torch.no_grad():
        expected = model.base_model(**batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(states(batch["input_ids"], batch["attention_mask"]), expected)


def test_labels_need_logits():
    model, ids = pair("llama").ours, torch.tensor([tiny.tokens(4)])
    with pytest.raises(ValueError, match="labels"):
        model.base_model(ids, labels=ids)
