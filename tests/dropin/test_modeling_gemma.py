"""`modeling_gemma`: signatures, and equality with the package's models and stock transformers' on
the same weights.
"""

import inspect

import pytest
import torch
import transformers

import twins
from mllama import MllamaForConditionalGeneration
from mllama.dropin._cache import KVCache as SharedCache
from mllama.dropin.modeling_gemma import (
    GemmaConfig,
    GemmaForCausalLM,
    KVCache,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

TEXT = {
    "vocab_size": twins.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
IDS = torch.tensor([[twins.IMAGE] * twins.PATCHES + twins.tokens(6)])


def config(**options) -> PaliGemmaConfig:
    given = {
        "text_config": TEXT,
        "image_token_index": twins.IMAGE,
        "projection_dim": 64,
        "hidden_size": 64,
    } | options
    return PaliGemmaConfig(vision_config=twins.VISION, **given)


def model(**options) -> PaliGemmaForConditionalGeneration:
    return twins.randomise(PaliGemmaForConditionalGeneration(config(**options))).eval()


def defaults(kind: type) -> dict:
    parameters = inspect.signature(kind).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "kwargs"}


def test_signatures():
    empty = inspect.Parameter.empty
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    assert defaults(GemmaConfig) == dict.fromkeys(required, empty) | {
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": None,
    }
    assert defaults(PaliGemmaConfig) == {
        "vision_config": None,
        "text_config": None,
        "ignore_index": -100,
        "image_token_index": 256000,
        "vocab_size": 257152,
        "projection_dim": 2048,
        "hidden_size": 2048,
        "pad_token_id": None,
    }
    assert list(inspect.signature(PaliGemmaForConditionalGeneration.forward).parameters)[1:6] == [
        "input_ids",
        "pixel_values",
        "attention_mask",
        "labels",
        "kv_cache",
    ]
    assert KVCache is SharedCache


def test_what_scripts_read_from_a_config():
    text = GemmaConfig(**TEXT, rope_theta=5000.0, max_position_embeddings=77)
    assert (
        text.rope_theta == 5000.0
        and text.max_position_embeddings == 77
        and text.pad_token_id is None
    )
    whole = config(text_config=text, pad_token_id=3)
    assert whole.text_config.num_image_tokens == 4 and whole.vision_config.projection_dim == 64
    assert whole.text_config.rope_parameters["rope_theta"] == 5000.0 and whole.ignore_index == -100
    assert (
        config(pad_token_id=3).text_config.pad_token_id == 3 == config(pad_token_id=3).pad_token_id
    )


def test_logits_are_stock_paligemmas_and_the_packages():
    ours, pictures = model(), twins.pictures(1)
    theirs = transformers.PaliGemmaForConditionalGeneration(ours.config).eval()
    theirs.load_state_dict(
        {twins.twin_name(name): value for name, value in ours.state_dict().items()}
    )
    own = MllamaForConditionalGeneration(ours.config).eval()
    own.load_state_dict(ours.state_dict())
    types = torch.zeros_like(IDS)
    output = ours(
        input_ids=IDS, pixel_values=pictures, attention_mask=torch.ones(1, 10), kv_cache=KVCache()
    )
    expected = theirs(IDS, pictures, torch.ones(1, 10), token_type_ids=types).logits
    torch.testing.assert_close(output["logits"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        output["logits"], own(IDS, pictures, token_type_ids=types).logits, rtol=0, atol=0
    )
    one_way = own(IDS, pictures).logits
    assert (
        output["logits"][:, 0] - one_way[:, 0]
    ).abs().max() > 0.1  # the first position sees the last


def test_token_by_token_as_generate_says_it():
    ours, pictures, cache, ids, mask = model(), twins.pictures(1), KVCache(), IDS, torch.ones(1, 10)
    said = []
    for _ in range(5):
        output = ours(input_ids=ids, pixel_values=pictures, attention_mask=mask, kv_cache=cache)
        assert output["kv_cache"] is cache
        ids = output["logits"][:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones(1, 1)], 1)
        said.append(int(ids))
    assert cache.num_items() == 14
    generated = ours.generate(
        IDS, pixel_values=pictures, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert generated[0, 10:].tolist() == said


def test_generate_takes_what_the_packages_takes():
    ours, pictures, options = (
        model(),
        twins.pictures(1),
        {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None},
    )
    plain = ours.generate(IDS, pixel_values=pictures, **options)
    typed = ours.generate(
        IDS, pixel_values=pictures, token_type_ids=torch.zeros_like(IDS), **options
    )
    encoded = ours.generate(IDS, image_features=ours.get_image_features(pictures), **options)
    assert torch.equal(typed, plain) and torch.equal(encoded, plain)
    with pytest.raises(ValueError, match="pixel_value"):
        ours.generate(IDS, pixel_value=pictures, **options)


def test_labels_are_not_seen_before_they_are_said():
    ours, pictures = model(), twins.pictures(1)
    labels = IDS.masked_fill(IDS == twins.IMAGE, -100)
    changed = IDS.clone()
    changed[0, -1] = 1 + (changed[0, -1] % 90)
    first, second = (ours(ids, pictures, labels=labels)["logits"] for ids in (IDS, changed))
    torch.testing.assert_close(first[:, :-1], second[:, :-1])


def test_ignore_index_is_honoured():
    token, pictures = int(IDS[0, 6]), twins.pictures(1)
    loss = model(ignore_index=token)(IDS, pictures, labels=IDS)["loss"]
    torch.testing.assert_close(
        loss, model()(IDS, pictures, labels=IDS.masked_fill(token == IDS, -100))["loss"]
    )


def test_padding_is_not_seen():
    ours, pictures = model(), twins.pictures(2)
    rows = [IDS[0].tolist(), IDS[0, :7].tolist()]
    batch = twins.batch(*rows)
    logits = ours(**batch, pixel_values=pictures)["logits"]
    for index, row in enumerate(rows):
        alone = ours(torch.tensor([row]), pictures[index : index + 1])["logits"][0]
        torch.testing.assert_close(logits[index, -len(row) :], alone, rtol=1e-4, atol=1e-4)


def test_the_head_is_the_embedding_matrix():
    ours = model()
    ours.tie_weights()
    assert (
        ours.lm_head.weight is ours.get_input_embeddings().weight
        and ours.vocab_size == twins.VOCABULARY
    )
    assert ours.multi_modal_projector.linear.out_features == 64


def test_the_decoder_alone_is_stock_gemmas():
    ours = twins.randomise(GemmaForCausalLM(GemmaConfig(**TEXT))).eval()
    theirs = transformers.GemmaForCausalLM(ours.config).eval()
    theirs.load_state_dict(
        {
            name.replace("language_model.", "model."): value
            for name, value in ours.state_dict().items()
        }
    )
    ids, cache = torch.tensor([twins.tokens(6)]), KVCache()
    torch.testing.assert_close(
        ours(ids, kv_cache=cache)["logits"], theirs(ids).logits, rtol=1e-4, atol=1e-4
    )
    embeds = ours.get_input_embeddings()(ids[:, :1])
    again = theirs(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(
        ours(inputs_embeds=embeds, kv_cache=cache)["logits"], again, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("text", [TEXT, GemmaConfig(**TEXT)], ids=["dict", "config"])
def test_folders_are_stock_paligemmas(text, tmp_path):
    ours, pictures = model(text_config=text), twins.pictures(1)
    ours.save_pretrained(tmp_path)
    types = torch.zeros_like(IDS)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)(
        IDS, pictures, token_type_ids=types
    ).logits
    read = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(read(IDS, pictures)["logits"], theirs, rtol=1e-4, atol=1e-4)


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="projection_dim 2048 must be the decoder's hidden_size 64"
    ):
        PaliGemmaForConditionalGeneration(config(projection_dim=2048))
