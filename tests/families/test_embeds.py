"""Images beside embeddings: the placeholders are told by theirs, so that PEFT's soft prompts may
stand before them.
"""

import peft
import pytest
import torch

import tiny
from families.test_arguments import LLAVA, PALIGEMMA
from tiny import pairs

FAMILIES = [LLAVA, "llava, siglip, several", PALIGEMMA, "mllama"]


def embedded(model, given: dict[str, torch.Tensor], soft: torch.Tensor) -> dict[str, torch.Tensor]:
    embeds = model.get_input_embeddings()(given["input_ids"])
    rest = {
        name: value
        for name, value in given.items()
        if name not in ("input_ids", "attention_mask", "token_type_ids")
    }
    return rest | {"inputs_embeds": torch.cat([soft.expand(len(embeds), -1, -1), embeds], 1)}


@pytest.mark.parametrize("family", FAMILIES)
def test_images_beside_embeddings_equal_stock(family):
    pair, given = pairs.with_inputs(family)
    soft = torch.randn(
        1, 3, pair.ours.spec.text.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    if family == "mllama":
        given["cross_attention_mask"] = torch.ones(2, 9, *given["cross_attention_mask"].shape[2:])
    types = (
        {"token_type_ids": torch.zeros(2, 3 + given["input_ids"].shape[1], dtype=torch.long)}
        if family == PALIGEMMA
        else {}
    )
    with torch.no_grad():
        mine, stock = (model(**embedded(model, given, soft), **types).logits for model in pair)
    tiny.close(mine, stock)


def test_embeddings_that_tell_no_placeholder_are_refused():
    pair, given = pairs.with_inputs(LLAVA)
    given = embedded(pair.ours, given, torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="placeholders"):
        pair.ours(**given | {"inputs_embeds": given["inputs_embeds"] + 1})
    beyond = pairs.pair("paligemma, placeholder beyond the vocabulary").ours
    with pytest.raises(ValueError, match="image_token_index"):
        beyond(
            inputs_embeds=torch.zeros(1, 12, 96), pixel_values=pairs.Pair(beyond, beyond).images(1)
        )
    crossed, given = pairs.with_inputs("mllama")
    with pytest.raises(ValueError, match="cross_attention_mask"):
        crossed.ours(**embedded(crossed.ours, given, torch.zeros(1, 2, 64)))


KINDS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def by_forward(model, given: dict[str, torch.Tensor], new: int) -> list[list[int]]:
    """Greedy tokens by forward passes over the whole text: transformers' generate of 5.24 calls the
    cache otherwise than PEFT does.
    """
    given = dict(given)
    for _ in range(new):
        logits = model(**given).logits[:, -1:]
        logits[..., tiny.IMAGE] = -torch.inf  # as suppress_tokens
        said = logits.argmax(-1)
        given["input_ids"] = torch.cat([given["input_ids"], said], 1)
        given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(said)], 1)
    return given["input_ids"][:, -new:].tolist()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "prefix tuning"),
        *((LLAVA, kind) for kind in KINDS),
        (PALIGEMMA, "prompt tuning"),
        (PALIGEMMA, "p-tuning"),
    ],
)
def test_soft_prompts_by_peft(family, kind):
    """Loss, the prompt's gradients and what is said equal those of a stock model with the same
    prompt.
    """
    pair, given = pairs.make(family), pairs.with_inputs(family)[1]
    given.pop("token_type_ids", None)
    pair.theirs.set_attn_implementation("eager")
    labels = given["input_ids"].clone()
    labels[:, :4] = -100
    tuned = []
    for model in pair:
        torch.manual_seed(0)
        tuned.append(peft.get_peft_model(model, KINDS[kind]()))
    tuned[0].load_state_dict(
        {name: value for name, value in tuned[1].state_dict().items() if "prompt_encoder" in name},
        strict=False,
    )
    gradients = []
    for model in tuned:
        model(**given, labels=labels).loss.backward()
        gradients.append(
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        )
        model.eval()
    assert gradients[0] and len(gradients[0]) == len(gradients[1])
    for mine, stock in zip(*gradients, strict=True):
        tiny.close(mine, stock, floor=1e-3)
    with torch.no_grad():
        tiny.close(tuned[0](**given).logits, tuned[1](**given).logits)
        expected = by_forward(tuned[1], given, 4)
    said = tuned[0].generate(
        **given, max_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=[tiny.IMAGE]
    )
    assert said[:, -4:].tolist() == expected
