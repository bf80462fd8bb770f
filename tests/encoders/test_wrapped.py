"""Modules around an encoder, such as torch.compile's."""

import pytest
import torch

import tiny
from tiny import pairs
from tiny.around import Around


def double(output):
    output.last_hidden_state = output.last_hidden_state * 2
    return output


@pytest.mark.parametrize("case", ["llava, clip, -2", "paligemma", "mllama"])
def test_what_stands_around_an_encoder_is_called(case):
    inputs = pairs.pair(case).inputs("equal rows")
    plain, hooked, around, compiled = (pairs.make(case).ours for _ in range(4))
    hooked.vision_tower.register_forward_hook(lambda tower, args, output: double(output))
    around.vision_tower = Around(around.vision_tower, double, delegates=True)
    calls = []
    compiled.vision_tower = torch.compile(
        compiled.vision_tower, backend=lambda graph, example: calls.append(1) or graph.forward
    )
    with torch.no_grad():
        expected = plain(**inputs).logits
        doubled = hooked(**inputs).logits
        assert torch.equal(around(**inputs).logits, doubled)
        assert not torch.equal(doubled, expected)
        tiny.close(compiled(**inputs).logits, expected)
    assert calls
