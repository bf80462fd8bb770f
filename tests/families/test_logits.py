"""Every family's numbers against stock transformers': logits, hidden states and attentions in
float32, rounding in bfloat16.
"""

import pytest
import torch

from tiny import close
from tiny.pairs import LANGUAGE, MIXED, ONE_EACH, PAIRED, Pair, make, pair

ALONE = [name for name in PAIRED if name.startswith("siglip")]


@pytest.mark.parametrize(
    ("rows", "side"),
    [
        ("one image", "left"),
        ("two images", "right"),
        (MIXED, "left"),
        (MIXED, "right"),
        ("no image", "right"),
        ("long", "left"),
    ],
)
@pytest.mark.parametrize("case", LANGUAGE)
def test_logits(case, rows, side):
    both = pair(case)
    for said in (0, 2) if both.ours.spec.bidirectional_prefix else (0,):
        batch = both.inputs(rows, side, said)
        seen = batch["attention_mask"].bool()
        with torch.no_grad():
            close(both.ours(**batch).logits[seen], both.theirs(**batch).logits[seen])


@pytest.mark.parametrize("case", ["paligemma", "paligemma, odd sizes"])
def test_a_prompt_without_token_types_is_seen_one_way(case):
    both = pair(case)
    batch = both.inputs("two images")
    seen, types = batch["attention_mask"].bool(), batch.pop("token_type_ids")
    with torch.no_grad():
        one_way, both_ways = (
            both.ours(**batch, **more).logits[seen] for more in ({}, {"token_type_ids": types})
        )
        close(one_way, both.theirs(**batch).logits[seen])
    assert not torch.allclose(one_way, both_ways, atol=1e-2)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", ALONE)
def test_features_of_the_encoder_alone(case, count):
    both = pair(case)
    with torch.no_grad():
        ours, theirs = (model(both.images(count), output_hidden_states=True) for model in both)
    assert ours.keys() == theirs.keys()
    close(ours.last_hidden_state, theirs.last_hidden_state)
    if both.ours.head is not None:
        close(ours.pooler_output, theirs.pooler_output)
    for mine, state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(mine, state)


@pytest.mark.parametrize("case", ONE_EACH)
def test_hidden_states_and_attentions(case):
    both = make(case)
    both.theirs.set_attn_implementation("eager")
    batch = both.inputs("two images", completion=2)
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (
            model(**batch, output_hidden_states=True, output_attentions=True) for model in both
        )
    for mine, state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(mine[seen], state[seen])
    for mine, weights in zip(ours.attentions, theirs.attentions, strict=True):
        assert mine.shape == weights.shape
        close(mine.transpose(1, 2)[seen], weights.transpose(1, 2)[seen])
    if both.ours.spec.encoder:
        # transformers 5.24 gives a list, one tensor per image
        close(
            ours.image_hidden_states.flatten(),
            torch.stack(list(theirs.image_hidden_states)).flatten(),
        )


def cast(both: Pair, dtype: torch.dtype) -> None:
    """Parameters alone: stock's rotary frequencies are buffers, which its from_pretrained leaves
    float32 and `.to` would round.
    """
    for model in both:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def errors_in_bfloat16(case: str, call) -> list[float]:
    """Ours and theirs: the root mean square of what `call` gives less the float32 result, on
    weights that bfloat16 holds exactly.
    """
    both = make(case)
    cast(both, torch.bfloat16)
    with torch.no_grad():
        rounded = [call(both, model).float() for model in both]
        cast(both, torch.float32)
        exact = call(both, both.theirs)
    return [(result - exact).square().mean().sqrt().item() for result in rounded]


@pytest.mark.parametrize("case", LANGUAGE)
def test_bfloat16_rounds_no_more_than_theirs(case):
    def call(both: Pair, model) -> torch.Tensor:
        batch = both.inputs(
            (["image", 60], [4, "image", 52], ["image", 3, "image", 40]), completion=10
        )
        return model(**batch).logits[batch["attention_mask"].bool()]

    ours, theirs = errors_in_bfloat16(case, call)
    assert 0 < ours <= 1.2 * theirs


@pytest.mark.parametrize("case", ALONE)
def test_bfloat16_of_the_encoder_rounds_no_more_than_theirs(case):
    ours, theirs = errors_in_bfloat16(
        case, lambda both, model: model(both.images(64)).last_hidden_state
    )
    assert 0 < ours <= 1.2 * theirs
