"""Other vocabularies: what is resized, saved and read again, by ours and by stock; and what would
be read as another model.
"""

import pytest
import torch
import transformers

import tiny
from mllama import MllamaForConditionalGeneration
from tiny import pairs

STOCK = {
    "llama": transformers.LlamaForCausalLM,
    "gemma": transformers.GemmaForCausalLM,
    "llava, clip, -2": transformers.LlavaForConditionalGeneration,
    "paligemma": transformers.PaliGemmaForConditionalGeneration,
    "mllama": transformers.MllamaForConditionalGeneration,
}


@pytest.mark.parametrize("rows", [98, 105])
@pytest.mark.parametrize("family", STOCK)
def test_a_resized_model_is_read_by_both(family, rows, tmp_path):
    ours, given = pairs.make(family).ours, pairs.with_inputs(family)[1]
    given["input_ids"] = given["input_ids"].clamp(max=97)
    with torch.no_grad():
        before = ours(**given).logits
        ours.resize_token_embeddings(rows, mean_resizing=False)
        after = ours(**given).logits
    torch.testing.assert_close(after[..., : min(rows, 99)], before[..., :rows])
    extra = 8 if family == "mllama" else 0
    assert ours.get_input_embeddings().weight.shape[0] == rows + extra and after.shape[-1] == rows
    assert ours.config.get_text_config().vocab_size == rows
    ours.save_pretrained(tmp_path)
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    again.reference = ours.reference
    theirs = STOCK[family].from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, after, rtol=0, atol=0)
        tiny.close(theirs(**given).logits, after)
    assert ours.generate(**given, max_new_tokens=3).shape[1] == given["input_ids"].shape[1] + 3


def test_the_placeholder_of_llama_vision_keeps_its_row(tmp_path):
    ours = pairs.make("mllama").ours
    token = ours.config.image_token_index
    row = ours.get_input_embeddings().weight[token].detach().clone()
    for rows in (150, 93):
        ours.resize_token_embeddings(rows)
        assert torch.equal(ours.get_input_embeddings().weight[token], row)
    with pytest.raises(ValueError, match="new_num_tokens"):
        ours.resize_token_embeddings(91)
    assert ours.resize_token_embeddings(pad_to_multiple_of=64).weight.shape[0] == 128 + 8
    assert ours.config.text_config.vocab_size == ours.lm_head.weight.shape[0] == 128


@pytest.mark.parametrize("family", STOCK)
def test_what_would_be_read_as_another_model_is_not_written(family, tmp_path):
    ours = pairs.make(family).ours
    embeddings = ours.get_input_embeddings()
    embeddings.weight = torch.nn.Parameter(
        torch.cat([embeddings.weight, embeddings.weight[:3]]).detach()
    )
    with pytest.raises(ValueError, match="embed_tokens"):
        ours.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_called_tied_and_is_not(tmp_path):
    ours = pairs.make("llama, factor 32, tied, older spelling").ours
    ours.save_pretrained(tmp_path)
    ours.lm_head.weight = torch.nn.Parameter(ours.lm_head.weight.detach().clone())
    ours.save_pretrained(
        tmp_path
    )  # the same values, as those that are gathered from several devices
    with torch.no_grad():
        ours.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        ours.save_pretrained(tmp_path)
    ours.config.tie_word_embeddings = False
    ours.save_pretrained(tmp_path)
    assert torch.equal(
        MllamaForConditionalGeneration.from_pretrained(tmp_path).lm_head.weight, ours.lm_head.weight
    )


@pytest.mark.parametrize("family", ["gemma", "paligemma"])
def test_matrices_that_are_tied_no_more_are_written_each(family, tmp_path):
    """Where the config alone was changed, both are still the same memory."""
    both = pairs.make(family)
    inputs = both.inputs("one row")
    both.ours.config.tie_word_embeddings = False
    both.ours.language_model.layers[1].mlp.up_proj.weight = both.ours.language_model.layers[
        0
    ].mlp.up_proj.weight
    with torch.no_grad():
        expected = both.ours(**inputs).logits
        both.ours.save_pretrained(tmp_path)
        read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
        assert torch.equal(read(**inputs).logits, expected)
        theirs = type(both.theirs).from_pretrained(tmp_path).eval()
        tiny.close(theirs(**inputs).logits, expected)
    assert not read.config.tie_word_embeddings
