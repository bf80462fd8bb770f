"""fusion="cross_attention": gated layers added to a text model, against transformers' layers put
into its Llama by hand.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import tiny
from fusion.by_hand import ByHand, same_gradients
from mllama import MllamaForConditionalGeneration
from mllama.fusion.cross_attention import CrossAttentionDecoderLayer

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def mixed() -> torch.Tensor:
    """Of two rows of seven words and two images each: the first row sees one, then both; the
    second none.
    """
    mask = torch.zeros(2, 7, 2, 1)
    mask[0, 1:, 0], mask[0, 4:, 1] = 1, 1
    return mask


@pytest.mark.parametrize(
    ("every", "layers", "places"),
    [(1, 2, [1, 3]), (2, 5, [2, 5]), (3, 3, [3]), (None, 9, [4, 9]), (None, 3, [3])],
)
def test_a_layer_is_added_after_every_so_many(every, layers, places):
    model = tiny.crossed(every, layers)
    crossed = [
        index
        for index, layer in enumerate(model.language_model.layers)
        if isinstance(layer, CrossAttentionDecoderLayer)
    ]
    assert crossed == places and len(model.language_model.layers) == layers + len(places)
    assert model.config.text_config.num_hidden_layers == layers
    assert [
        (getattr(layer, "self_attn", None) or layer.cross_attn).layer_idx
        for layer in model.language_model.layers
    ] == list(range(layers + len(places)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("every", "layers", "projector"), [(1, 2, "mlp"), (2, 5, "linear")])
@pytest.mark.parametrize("each", [1, 2])
def test_logits_equal_those_by_hand(each, every, layers, projector, side):
    model = tiny.crossed(every, layers, projector=projector)
    inputs = tiny.texts(side) | {"pixel_values": tiny.images(2 * each)}
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        got = model(**inputs)
        tiny.close(got.logits[seen], ByHand(model).crossing(**inputs)[seen])
        tiny.close(got.image_hidden_states, ByHand(model).visual(inputs["pixel_values"]))
        features = model.get_image_features(inputs.pop("pixel_values"))
        assert torch.equal(model(**inputs, image_features=features).logits, got.logits)


def test_a_mask_says_who_sees_what():
    model, inputs = tiny.crossed(), tiny.texts("right") | {"pixel_values": tiny.images(4)}
    with torch.no_grad():
        got = model(**inputs, cross_attention_mask=mixed()).logits
        text = tiny.texts("right")["input_ids"]
        tiny.close(
            got[1, :4], model(text[1:, :4]).logits[0]
        )  # a row that sees no image is as one without
        tiny.close(
            got[0, 1:4],
            model(text[:1], tiny.images(4)[:1], cross_attention_mask=mixed()[:1, :, :1]).logits[
                0, 1:4
            ],
        )
        model.reference = (
            "hf"  # as transformers: who sees none attends to all, and leaves out the other half
        )
        seen = inputs["attention_mask"].bool()
        tiny.close(
            model(**inputs, cross_attention_mask=mixed()).logits[seen],
            ByHand(model).crossing(**inputs, mask=mixed())[seen],
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_every_gradient_equal_those_by_hand(checkpointed):
    model = tiny.crossed()
    oracle, inputs = ByHand(model), tiny.texts("right") | {"pixel_values": tiny.images(4)}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if checkpointed:
        model.train().gradient_checkpointing_enable()
    loss = model(**inputs, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(
        oracle.crossing(**inputs)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    same_gradients(model, oracle)


def test_gates_at_zero_leave_the_text_model_and_learn():
    model, inputs = tiny.crossed(), tiny.texts() | {"pixel_values": tiny.images(2)}
    gates = [parameter for name, parameter in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 4
    for gate in gates:
        torch.nn.init.zeros_(gate)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**tiny.texts()).logits)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    reached = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert {name for name in reached if "cross" in name} == {
        name for name, _ in model.named_parameters() if name.endswith("_gate")
    }
    assert not any(name.startswith(("vision_tower", "multi_modal_projector")) for name in reached)
    torch.optim.SGD(gates, lr=1.0).step()
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(
        parameter.grad.any()
        for name, parameter in model.named_parameters()
        if name != "language_model.embed_tokens.weight"
    )


def test_a_new_model_starts_with_gates_at_zero():
    model = MllamaForConditionalGeneration(tiny.crossed().config).eval()
    with torch.no_grad():
        assert torch.equal(
            model(**tiny.texts(), pixel_values=tiny.images(2)).logits, model(**tiny.texts()).logits
        )


@pytest.mark.parametrize(
    "options",
    [GREEDY, GREEDY | {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams"],
)
@pytest.mark.parametrize("masked", [True, False])
def test_caches_change_nothing(masked, options):
    model = tiny.crossed(2, 5)
    inputs = (
        tiny.texts()
        | {"pixel_values": tiny.images(4)}
        | ({"cross_attention_mask": mixed()} if masked else {})
    )
    expected = model.generate(**inputs, **options)
    for more in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache()},
        {"past_key_values": DynamicCache(config=model.config)},
    ):
        if "past_key_values" not in more or "num_beams" not in options:
            assert torch.equal(model.generate(**inputs, **options, **more), expected), more
    for row in range(2):
        seen = inputs["attention_mask"][row].bool()
        one = {
            name: value[row : row + 1, seen]
            for name, value in inputs.items()
            if name != "pixel_values"
        }
        alone = model.generate(**one, pixel_values=tiny.images(4)[2 * row : 2 * row + 2], **options)
        assert torch.equal(alone[0, -6:], expected[row * len(alone), -6:])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_token_by_token(kind):
    model, ids = tiny.crossed(2, 5), tiny.texts()["input_ids"]
    cache = kind(config=model.config, **{"max_cache_len": 12} if kind is StaticCache else {})
    with torch.no_grad():
        whole = model(ids, tiny.images(2)).logits
        parts = [model(ids[:, :4], tiny.images(2), past_key_values=cache)]
        parts += [model(ids[:, index : index + 1], past_key_values=cache) for index in (4, 5, 6)]
    tiny.close(torch.cat([part.logits for part in parts], 1), whole)


@pytest.mark.parametrize("first", [0, 1], ids=["text before any image", "an image first"])
def test_further_images_come_after_those_in_the_cache(first):
    model, ids, pixels = tiny.crossed(2, 5), tiny.texts()["input_ids"], tiny.images(4)
    mask = torch.ones(2, 7, 2, 1)
    mask[:, :4, first:] = 0
    each = [pixels[:: 2 if first else 1], pixels[1::2]]  # a row has the first or both of its two
    with torch.no_grad():
        whole = model(ids, pixels, cross_attention_mask=mask).logits
        begun = model(ids[:, :4], each[0] if first else None)
        rest = model(
            ids[:, 4:], each[1] if first else pixels, past_key_values=begun.past_key_values
        )
    tiny.close(torch.cat([begun.logits, rest.logits], 1), whole)


def test_compile():
    model, inputs = (
        tiny.crossed(layers=1, vision={"num_hidden_layers": 1}),
        tiny.texts() | {"pixel_values": tiny.images(2)},
    )
    with torch.no_grad():
        tiny.close(
            torch.compile(model, backend="eager")(**inputs, use_cache=False).logits,
            model(**inputs).logits,
        )


def test_files_keep_it(tmp_path):
    model, inputs = tiny.crossed(2, 5), tiny.texts() | {"pixel_values": tiny.images(2)}
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert (
        read.config.fusion,
        read.config.cross_attention_every,
        read.config.text_config.num_hidden_layers,
    ) == ("cross_attention", 2, 5)
    with torch.no_grad():
        assert torch.equal(read(**inputs).logits, model(**inputs).logits)


def test_adapters_reach_both_kinds_of_layers():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        tiny.crossed(), peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2)
    )
    names = {
        name.split(".lora_")[0].split("layers.")[1]
        for name, _ in adapted.named_parameters()
        if "language_model" in name and "lora_" in name
    }
    assert {
        "0.self_attn.q_proj",
        "1.cross_attn.q_proj",
        "2.self_attn.o_proj",
        "3.cross_attn.o_proj",
    } <= names


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cross_attention_every": 0}, "cross_attention_every"),
        ({"cross_attention_every": 3}, "cross_attention_every"),
        ({"cross_attention_every": True}, "cross_attention_every"),
        ({"num_image_tokens": 2}, "num_image_tokens"),
    ],
)
def test_configs_that_cannot_be_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        tiny.config(**{"fusion": "cross_attention"} | options)


def test_calls_that_cannot_be_are_refused():
    model, inputs = tiny.crossed(image_token_index=tiny.VOCAB_SIZE), tiny.texts()
    with pytest.raises(ValueError, match="3 for 2 rows"):
        model(**inputs, pixel_values=tiny.images(3))
    with pytest.raises(ValueError, match="cross_attention_mask"):
        model(**inputs, pixel_values=tiny.images(2), cross_attention_mask=mixed())
    with pytest.raises(ValueError, match="image_features"):
        model(**inputs, image_features=torch.zeros(2, 8, 64))
    with pytest.raises(ValueError, match="prefill_chunk_size"):  # every chunk would see them anew
        model.generate(**inputs, image_features=torch.zeros(2, 4, 64), prefill_chunk_size=2)
    with pytest.raises(IndexError, match="within the vocabulary"):
        model(torch.full((1, 3), tiny.VOCAB_SIZE), pixel_values=tiny.images(1))
    with pytest.raises(ValueError, match="4 layers.*3"):
        model(**inputs, past_key_values=StaticCache(tiny.crossed(layers=3).config, max_cache_len=9))
