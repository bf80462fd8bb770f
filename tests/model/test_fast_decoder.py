"""Decoding by `decode_step` against the same model's layers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache

import tiny
from helpers import counted_steps, decoded, instruction_set, instruction_sets, needs_kernels
from mllama.model.fast_decoder import FastDecoder, find_obstacle
from mllama.nn.packed import PackedLinear
from mllama.ops import pack_weight
from mllama.ops.decode import decode_step
from mllama.ops.packed_layout import PACKINGS
from mllama.quant.packer import RECIPES, optimize
from mllama.runtime.session import Session
from tiny import pairs
from tiny.around import Around

pytestmark = needs_kernels
CODES = [packing for packing, kind in PACKINGS.items() if kind.quantized]


def check(model, inputs, weights="f32", tolerance=1e-5, kv_cache=None):
    check_packed(optimize(copy.deepcopy(model), weights), inputs, tolerance, kv_cache)


def check_packed(model, inputs, tolerance=1e-5, kv_cache=None):
    ids, logits = decoded(model, inputs, True, kv_cache)
    expected_ids, expected = decoded(model, inputs, False, kv_cache)
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert ids == expected_ids


@pytest.mark.parametrize(("case", "rows"), pairs.SESSIONS)
def test_every_family(case, rows):
    both = pairs.pair(case)
    check(both.ours, both.inputs(rows))


@pytest.mark.parametrize("reference", ["meta", "hf"])
@pytest.mark.parametrize("rows", pairs.TILED_ROWS)
def test_layers_that_attend_to_images(rows, reference):
    model = pairs.make("mllama").ours
    model.reference = reference
    check(model, pairs.pair("mllama").inputs(rows))


@pytest.mark.parametrize("each", [0, 2])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "model",
    [tiny.prepend(num_image_tokens=3), tiny.crossed()],
    ids=["tokens before the text", "added layers"],
)
def test_images_without_placeholders(model, rows, each):
    texts = {name: value[:rows] for name, value in tiny.texts().items()}
    images = {"pixel_values": tiny.images(rows * each)} if each else {}
    if model.spec.fusion == "prepend" and rows > 1 and each:
        texts["attention_mask"] = torch.ones_like(texts["attention_mask"])
    check(model, texts | images)


def test_padding_after_visual_tokens_runs_by_the_layers(caplog):
    model = optimize(tiny.prepend(num_image_tokens=3), "f32")
    inputs = tiny.texts() | {"pixel_values": tiny.images(2)}
    with caplog.at_level("DEBUG", logger="mllama"), counted_steps() as calls:
        Session(model).generate(inputs, max_new_tokens=3)
    assert calls.call_count == 0 and "padding" in caplog.text


@pytest.mark.parametrize("weights", RECIPES)
@pytest.mark.parametrize("case", ["gemma2", "mllama"])
def test_every_format(case, weights):
    # Activations of the two ways are rounded apart where they differ in the last bit.
    tolerance = 1e-5 if RECIPES[weights].decoder in ("f32", "bf16", "f16") else 3e-2
    check(pairs.pair(case).ours, pairs.pair(case).inputs(), weights, tolerance)


@pytest.mark.parametrize("first", range(len(CODES)))
def test_formats_mixed_in_a_layer(first):
    """As in GGUF files, where q, k and v, or gate and up, may have blocks of their own types."""
    model = optimize(copy.deepcopy(pairs.pair("gemma2").ours), "int8")
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for place, linear in enumerate(linears, first):
        packing = CODES[place % len(CODES)]
        linear.packed, linear.packing = pack_weight(linear.dense(), packing), packing
    inputs = pairs.pair("gemma2").inputs()
    ids, logits = decoded(model, inputs, True)
    expected_ids, expected = decoded(model, inputs, False)
    assert (logits - expected).abs().max() <= 3e-2 * expected.abs().max()
    assert ids == expected_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_16_bits(dtype):
    model = copy.deepcopy(pairs.pair("gemma3_text").ours).to(dtype)
    check(model, pairs.pair("gemma3_text").inputs(), "f32", 3e-2)


@pytest.mark.parametrize("kv_cache", ["int8", "bf16", "f16"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3_text", "mllama"])
def test_a_cache_in_a_dtype_of_its_own(case, kv_cache):
    # Where the last bit of a key differs, its code may be the next one.
    check(pairs.pair(case).ours, pairs.pair(case).inputs(), tolerance=3e-2, kv_cache=kv_cache)


def test_a_first_layer_that_attends_to_images_there_are_none_of():
    model = optimize(copy.deepcopy(pairs.pair("mllama").ours), "f32")
    spec = model.spec.text
    assert 0 not in spec.cross_attention_layers
    inputs = {"input_ids": torch.randint(1, 90, (1, 4))}
    for kv_cache in ("int8", "bf16"):
        ids = decoded(model, inputs, True, kv_cache)[0]
        assert ids == decoded(model, inputs, False, kv_cache)[0]


def test_every_instruction_set_reads_a_quantized_cache():
    for isa in instruction_sets():
        with instruction_set(isa):
            inputs = pairs.pair("gemma3_text").inputs()
            check(pairs.pair("gemma3_text").ours, inputs, tolerance=3e-2, kv_cache="int8")


def test_every_instruction_set():
    for isa in instruction_sets():
        with instruction_set(isa):
            check(pairs.pair("llama").ours, pairs.pair("llama").inputs())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "int4")
    inputs, before = pairs.pair("llama").inputs(), torch.get_num_threads()
    expected = decoded(model, inputs, True)
    torch.set_num_threads(threads)
    try:
        ids, logits = decoded(model, inputs, True)
    finally:
        torch.set_num_threads(before)
    assert ids == expected[0] and torch.equal(logits, expected[1])


def test_more_rows_than_a_step_takes():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    ids = torch.randint(1, 90, (17, 4))
    expected = [
        row.token_ids
        for one in ids
        for row in Session(model).generate({"input_ids": one[None]}, max_new_tokens=3).completions
    ]
    rows = Session(model).generate({"input_ids": ids}, max_new_tokens=3).completions
    assert [row.token_ids for row in rows] == expected


def test_a_model_that_is_not_packed_runs_by_its_layers():
    decoded(pairs.pair("llama").ours, pairs.pair("llama").inputs(), False)
    with pytest.raises(ValueError, match="decoder"):
        FastDecoder(pairs.pair("llama").ours.language_model)


def test_devices_without_a_kernel():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    model.language_model.layers[1].to("meta")
    assert "cpu, meta" in find_obstacle(model.language_model)
    assert "meta" in find_obstacle(model.to("meta").language_model)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": torch.zeros(2, 1, 3)},
        {"hidden": torch.zeros(2, 1, 64, dtype=torch.float64)},
        {"hidden": torch.zeros(2, 64)},
        {"hidden": torch.zeros(2, 0, 64)},
        {"hidden": torch.zeros(1, 2, 64)},
        {"length": torch.tensor([-1])},
        {"length": torch.tensor([40])},
        {"length": torch.tensor([4, 4])},
        {"length": torch.tensor([4.0])},
        {"length": torch.tensor([4], device="meta")},
        {"length": torch.tensor([2**63 - 1])},
        {"image_keys": 5},
        {"image_keys": 2**62},
        {"keys": []},
        {"values": [torch.zeros(2, 2, 8, 8)] * 2},
        {"positions": torch.zeros(2)},
        {"positions": torch.zeros(1, dtype=torch.int64)},
        {"first_key": torch.tensor([0, 9])},
        {"first_key": torch.tensor([0])},
        {"first_key": torch.tensor([0, 0], device="meta")},
        {"hidden": torch.zeros(2, 1, 64, device="meta")},
        {"values": [torch.zeros(2, 2, 8, 16, device="meta")] * 2},
        {"decoder": 10**9},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change):
    model, arguments = step_arguments()
    shape = 2, 1, model.spec.text.hidden_size
    assert decode_step(**arguments).shape == shape
    with pytest.raises((ValueError, RuntimeError), match="decode_step"):
        decode_step(**arguments | change)


def test_fake_tensors_have_the_shapes_of_real_ones():
    model, arguments = step_arguments()
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        result = decode_step(**fake)
    assert (result.shape, result.dtype) == ((2, 1, model.spec.text.hidden_size), torch.float32)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_fake_tensors_of_a_gpu(device):
    with FakeTensorMode():
        hidden = torch.zeros(1, 2, 64, device=device)
        caches = [torch.zeros(1, 2, 8, 16, device=device, dtype=torch.int8)]
        positions, length = (torch.zeros(n, dtype=torch.int64, device=device) for n in (2, 1))
        result = decode_step(1, hidden, positions, caches, caches, length, None, 0, None, None)
    assert str(result.device) == device and result.shape == (1, 2, 64)


def step_arguments():
    """A model, whose decoder lives as long, and arguments that fit it."""
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    model._fast = FastDecoder(model.language_model)
    spec = model.spec.text
    cache = [torch.zeros(2, spec.num_key_value_heads, 8, spec.head_dim)] * spec.num_hidden_layers
    return model, {
        "decoder": model._fast._handle,
        "hidden": torch.zeros(2, 1, spec.hidden_size),
        "positions": torch.zeros(2, dtype=torch.int64),
        "keys": cache,
        "values": cache,
        "length": torch.tensor([4]),
        "first_key": None,
        "image_keys": 0,
        "image_mask": None,
        "sees_image": None,
    }


def test_a_default_dtype_changes_nothing():
    model, inputs = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32"), pairs.pair("llama")
    expected, before = decoded(model, inputs.inputs(), True)[0], torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert decoded(model, inputs.inputs(), True)[0] == expected
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_models_have_a_decoder_of_their_own(copied):
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    inputs = pairs.pair("llama").inputs()
    expected = decoded(model, inputs, True)[0]
    other = copied(model)
    assert other._fast is None
    del model
    assert decoded(other, inputs, True)[0] == expected


def test_a_model_that_got_a_hook_is_copied():
    model, inputs = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32"), pairs.pair("llama")
    expected = decoded(model, inputs.inputs(), True)[0]
    model.language_model.norm.register_forward_hook(do_nothing)
    assert decoded(copy.deepcopy(model), inputs.inputs(), False)[0] == expected


def do_nothing(*args) -> None:
    """A hook that changes nothing."""


def test_changed_weights_are_noticed_at_the_next_prompt():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    inputs = pairs.pair("llama").inputs()
    before = decoded(model, inputs, True)[1]
    with torch.no_grad():
        model.language_model.norm.weight.copy_(model.language_model.norm.weight.flip(0))
        model.language_model.norm.weight.data = model.language_model.norm.weight.data.clone()
    after = decoded(model, inputs, True)[1]
    assert not torch.allclose(before, after, atol=1e-2)
    check_packed(model, inputs)


def test_a_prompt_of_one_token_notices_changes_too():
    model, prompt = optimize(tiny.model(), "f32").bfloat16(), {"input_ids": torch.tensor([[5]])}
    decoded(model, prompt, True)
    other = optimize(tiny.model(seed=1), "f32").bfloat16()
    model.load_state_dict(other.state_dict())
    assert torch.equal(decoded(model, prompt, True)[1], decoded(other, prompt, True)[1])
    model.language_model.norm.register_forward_hook(do_nothing)
    decoded(model, prompt, False)


def test_a_short_prompt_after_another_notices_changes_too():
    model, first = optimize(tiny.model(), "f32"), [5, 6, 7]
    session = Session(model)
    session.generate({"input_ids": torch.tensor([first])}, max_new_tokens=3)
    model.language_model.norm.register_forward_hook(do_nothing)
    with counted_steps() as calls:
        turn = {"input_ids": torch.tensor([[*first, 8, 9]])}
        assert session.generate(turn, max_new_tokens=3).num_reused_tokens == 0
        cache = DynamicCache()
        model.generate(torch.tensor([first]), past_key_values=cache, max_new_tokens=3)
    assert calls.call_count == 0


def around(part, delegates):
    def edit(model):
        owner, _, name = part.rpartition(".")
        owner = model.language_model.get_submodule(owner)
        setattr(owner, name, Around(getattr(owner, name), lambda x: -3 * x.flip(-1), delegates))

    return edit


def of_another_class(model):
    class Flipped(type(model.language_model.layers[0].mlp)):
        def forward(self, x):
            return -3 * super().forward(x)

    model.language_model.layers[0].mlp.__class__ = Flipped


def swapped(model):
    layers = model.language_model.layers
    layers[0], layers[1] = layers[1], layers[0]


def without_the_last(model):
    model.language_model.layers = model.language_model.layers[:-1]


def fewer(model):
    model.config.num_hidden_layers = 1


def without_a_norm(model):
    model.language_model.norm = nn.Identity()


PARTS = ["layers.1", "layers.0.mlp", "layers.0.self_attn", "layers.0.input_layernorm"]
EDITS = {
    f"{part}, {delegates}": around(part, delegates) for part in PARTS for delegates in (True, False)
}
EDITS |= {
    edit.__name__: edit
    for edit in (of_another_class, swapped, without_a_norm, without_the_last, fewer)
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_modules_in_place_of_others_are_run(edit):
    models = [copy.deepcopy(pairs.pair("llama").ours) for _ in range(2)]
    models[1] = optimize(models[1], "f32")
    inputs = pairs.pair("llama").inputs()
    options = {"max_new_tokens": 8, "pad_token_id": 0}
    before = models[0].generate(**inputs, **options)
    for model in models:
        model.generate(**inputs, **options)
        edit(model)
    expected = models[0].generate(**inputs, **options, use_cache=False)
    assert not torch.equal(expected, before)
    with counted_steps() as calls:
        for model in models:
            assert torch.equal(model.generate(**inputs, **options), expected)
    assert not calls.call_count


def test_hooks_of_all_modules_are_run():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    inputs, kind = pairs.pair("llama").inputs(), type(model.language_model.layers[0].mlp)
    options = {"max_new_tokens": 8, "pad_token_id": 0}
    before = model.generate(**inputs, **options)

    def triple(module, args, output):
        return -3 * output if type(module) is kind else None

    hook = nn.modules.module.register_module_forward_hook(triple)
    try:
        changed = model.generate(**inputs, **options)
    finally:
        hook.remove()
    for layer in model.language_model.layers:
        layer.mlp.register_forward_hook(triple)
    assert torch.equal(changed, model.generate(**inputs, **options))
    assert not torch.equal(changed, before)


@pytest.mark.parametrize("positions", [torch.tensor([[6.5]]), torch.tensor([[True]])])
def test_positions_of_another_dtype_are_refused(positions):
    model, cache = optimize(tiny.model(), "f32"), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), cache=cache)
        with pytest.raises(TypeError, match="position_ids"):
            model(torch.tensor([[7]]), cache=cache, position_ids=positions)


def test_a_batch_without_rows():
    model, cache = optimize(tiny.model(), "int8"), DynamicCache()
    with torch.no_grad():
        assert model(torch.zeros(0, 3).long(), cache=cache).logits.shape == (0, 3, tiny.VOCAB_SIZE)
        assert model(torch.zeros(0, 1).long(), cache=cache).logits.shape == (0, 1, tiny.VOCAB_SIZE)
