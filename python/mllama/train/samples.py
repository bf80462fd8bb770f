"""Answers of the model while it is trained."""

from collections.abc import Sequence
from typing import Any

import torch

from mllama.data.rows import Example
from mllama.hf.answering import GenerateSession
from mllama.processing.conversation import encode_messages
from mllama.processing.image import load_image
from mllama.processing.messages import as_text
from mllama.train.figures import Sample

_MAX_NEW_TOKENS = 64


@torch.no_grad()
def answer_samples(model: Any, processor: Any, examples: Sequence[Example]) -> list[Sample]:
    """The model's greedy answers to the last question of each example. The model is in eval mode,
    and no random number is drawn.
    """
    session = GenerateSession(model, processor)
    found = []
    for example in examples:
        asked, expected = example.messages[:-1], example.messages[-1]
        inputs = encode_messages(processor, asked)
        answer = session.generate(inputs, max_new_tokens=_MAX_NEW_TOKENS).completions[0].text
        images = tuple(map(load_image, example.images))
        question = as_text(asked[-1]["content"])
        found.append(Sample(question, as_text(expected["content"]), answer.strip(), images))
    return found
