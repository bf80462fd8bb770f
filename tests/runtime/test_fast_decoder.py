"""Decoding by `decode_step` against the same model's layers."""

import copy

import pytest
import torch

from families import cases, test_mllama
from fusion import test_added_layers as added
from fusion import test_prepend as prepend
from helpers import instruction_set, instruction_sets, needs_kernels
from mllama.quant.packer import RECIPES, optimize
from mllama.runtime import session as sessions
from mllama.runtime.fast_decoder import FastDecoder
from mllama.runtime.session import Session

pytestmark = needs_kernels
LENGTH = 6
ROWS = ["one row", "one picture", "a row without a picture", "no picture"]


class Recorded(Session):
    """Keeps the logits of every step."""

    def _step(self, tokens, inputs):
        logits = super()._step(tokens, inputs)
        self.logits.append(logits.clone())
        return logits


def decoded(model, inputs, fast):
    """Greedy tokens and logits, by `decode_step` or by the layers."""
    session = Recorded(model)
    session.logits = []
    assert isinstance(session._fast, FastDecoder)
    if not fast:
        session._fast = None
    result = session.generate(inputs, max_new_tokens=LENGTH)
    return [row.token_ids for row in result.completions], torch.stack(session.logits)


def check(model, inputs, weights="f32", tolerance=1e-5):
    model = optimize(copy.deepcopy(model), weights)
    ids, logits = decoded(model, inputs, True)
    expected_ids, expected = decoded(model, inputs, False)
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert ids == expected_ids


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", cases.TALKING)
def test_every_family(case, rows):
    pair = cases.pair(case)
    check(pair.ours, cases.inputs(pair, rows))


@pytest.mark.parametrize("reference", ["meta", "hf"])
@pytest.mark.parametrize("rows", test_mllama.ROWS)
def test_layers_that_attend_to_images(rows, reference):
    model = test_mllama.pair().ours
    model.reference = reference
    check(model, test_mllama.inputs(model, *test_mllama.ROWS[rows]))
