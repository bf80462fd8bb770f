"""What config.json may say."""

import json

import pytest

import tiny
from mllama import MllamaForConditionalGeneration
from mllama.families import llava
from mllama.weights import rows as engine
from tiny.folders import change


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c.update(model_type="mistral"), "model_type 'mistral'"),
        (lambda c: c.update(model_type="LLaVA"), "model_type 'LLaVA'"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.update(model_type=["llava"]), "is not known"),
        (lambda c: c.update(vision_feature_layer=-9), "vision_feature_layer"),
        (lambda c: c.update(vision_feature_select_strategy="x"), "vision_feature_select_strategy"),
        (
            lambda c: c["text_config"].update(model_type="gemma"),
            "text_config of model_type 'gemma'",
        ),
        (lambda c: c["text_config"].update(model_type=["llama"]), "text_config of model_type"),
        (lambda c: c["vision_config"].update(model_type="clip_vision_model"), "class_embedding"),
        (lambda c: c.pop("vision_config"), "class_embedding"),
        (
            lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}),
            "quantization_config",
        ),
        (lambda c: c["text_config"].update(num_attention_heads=0), "num_attention_heads"),
        (lambda c: c["text_config"].update(hidden_size="64"), "hidden_size"),
        (lambda c: c.update(image_token_index="x"), "image_token_index"),
    ],
)
def test_configs_that_do_not_fit_are_refused(edit, named, saved):
    folder, _ = saved
    change(folder, edit)
    with pytest.raises(ValueError, match=named):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"llava"', "[" * 100000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(text, saved):
    folder, _ = saved
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_config_fields_that_steer_code_are_left_out(saved):
    folder, _ = saved
    steering = {
        "_attn_implementation_internal": "x/y",
        "auto_map": {"AutoModel": "evil.Model"},
        "trust_remote_code": True,
    }
    change(folder, lambda c: (c.update(steering), c["text_config"].update(steering)))
    loaded = MllamaForConditionalGeneration.from_pretrained(folder)
    assert (
        loaded.config._attn_implementation == "eager"
        and loaded.config.text_config._attn_implementation in (None, "eager")
    )
    assert not hasattr(loaded.config, "auto_map") and not hasattr(
        loaded.config.text_config, "trust_remote_code"
    )


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (
            lambda c: c["text_config"].update(num_hidden_layers=1000000),
            "text_config: num_hidden_layers",
        ),
        (
            lambda c: c["vision_config"].update(num_hidden_layers=1000000),
            "vision_config: num_hidden_layers is 1000000",
        ),
        (lambda c: c["text_config"].update(vocab_size=2**40), "vocab_size"),
        (lambda c: c["text_config"].update(intermediate_size=2**63), "intermediate_size"),
        (lambda c: c["vision_config"].update(image_size=2**31 - 1, patch_size=1), "image_size"),
        (lambda c: c["text_config"].update(torch_dtype="foo"), "torch_dtype"),
        (lambda c: c["text_config"].update(torch_dtype="load"), "torch_dtype"),
        (lambda c: c["text_config"].update(self=1), "'self'"),
        (lambda c: c["vision_config"].update(to_dict=3), "'to_dict'"),
        (lambda c: c.update(self=1), "'self'"),
        (lambda c: c.update(to_dict=3), "'to_dict'"),
        (lambda c: c.update(text_config="x"), "text_config"),
        (lambda c: c.update(vision_config=[1]), "vision_config"),
        (lambda c: c["text_config"].update(rope_theta=[1]), "rope_theta"),
        (lambda c: c["text_config"].update(rope_scaling={"rope_type": []}), "rope_type"),
    ],
)
def test_hostile_configs_are_refused_by_name(edit, named, saved):
    folder, _ = saved
    change(folder, edit)
    with pytest.raises(ValueError, match=named):
        MllamaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [{"max_new_tokens": "a"}, {"watermarking_config": {"a": 1}}, {"to_dict": 3}, {"self": 1}],
)
def test_a_generation_config_that_cannot_be_is_refused(content, saved):
    folder, _ = saved
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        MllamaForConditionalGeneration.from_pretrained(folder)


def test_the_table_is_invertible():
    for name in tiny.model().state_dict():
        (theirs,) = engine.file_names(llava.WEIGHT_MAP, name)
        (move,), unknown, twice = engine.plan_moves(llava.WEIGHT_MAP, [theirs])
        assert move.ours == [name] and not unknown and not twice
    with pytest.raises(ValueError, match="no place"):
        engine.file_names(llava.WEIGHT_MAP, "surprise")
