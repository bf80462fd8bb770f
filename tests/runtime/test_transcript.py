"""Conversations whose answers stay the tokens that were generated, with every kind of template."""

import pytest
import torch

from helpers import prefilled
from mllama.processing.meta import CHAT_TEMPLATE as META
from mllama.processing.prompt import CHAT_TEMPLATE as OURS
from mllama.runtime.completion import Completion
from mllama.runtime.questions import encode
from mllama.runtime.session import Session
from mllama.runtime.transcript import Transcript
from processing import templates
from tiny import pairs, stock, tokenizers

QUESTIONS = ["How many circles?", " two red three", "What colour is it?", "a b c d"]
ANSWERS = [" three circles.", "blue\n", "  ", "describe the picture: hello\n\n"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
KEPT = {
    "llama vision": templates.LLAMA_VISION,
    "chatml": templates.CHATML,
    "llama 2": templates.LLAMA2,
    "vicuna": templates.VICUNA,
    "gemma": templates.GEMMA,
    "mistral": templates.MISTRAL,
    "thinking, without thoughts": templates.THINKING,
    "ours": OURS,
    "meta": META,
}


@pytest.fixture(scope="module")
def tokenizer():
    made = tokenizers.make()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def in_bytes(tokenizer, text: str) -> list[int]:
    """Ids of a text, one a byte, where the tokenizer would join several."""
    return [token for byte in text for token in tokenizer.encode(byte, add_special_tokens=False)]


def talk(tokenizer, answers: list[str], ends: bool = True, system: str | None = None):
    """Yields each turn's ids as the template has them, as they are read, and the answer's."""
    transcript, turns = Transcript(tokenizer), []
    for question, text in zip(QUESTIONS, answers, strict=False):
        inputs = encode(tokenizer, None, question, turns, system)
        read = transcript.continue_with(inputs)
        assert read["attention_mask"].shape == read["input_ids"].shape
        ids = in_bytes(tokenizer, text)
        yield inputs["input_ids"][0].tolist(), read["input_ids"][0].tolist(), ids
        ids_and_end = [*ids, tokenizer.eos_token_id] if ends else ids
        transcript.answer(Completion(ids_and_end, text, "eos" if ends else "length"))
        turns.append((question, text.strip()))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_what_was_read_and_generated_is_never_encoded_otherwise(tokenizer, name, ends):
    tokenizer.chat_template = KEPT[name]
    before = []
    for written, read, answer in talk(tokenizer, ANSWERS, ends):
        assert read[: len(before)] == before
        assert len(read) > len(before)
        as_text = ["".join(tokenizer.decode(ids).split()) for ids in (written, read)]
        assert as_text[0] == as_text[1]
        before = read + answer


@pytest.mark.parametrize("name", KEPT)
def test_a_session_computes_what_is_new_in_each_turn(tokenizer, name):
    tokenizer.chat_template = KEPT[name]
    model = pairs.of(
        stock.make("llama", vocab_size=len(tokenizer), max_position_embeddings=999)
    ).ours
    session, transcript, turns = Session(model, tokenizer), Transcript(tokenizer), []
    known = 0
    for question in QUESTIONS[:3]:
        inputs = transcript.continue_with(encode(tokenizer, None, question, turns))
        with prefilled(model) as passes:
            made = session.generate(inputs, max_new_tokens=9, temperature=1.0, seed=4)
        row, length = made.completions[0], inputs["input_ids"].shape[1]
        assert passes[0] == (1, length - known)
        known = length + len(row.token_ids) - 1  # the last token was never read
        transcript.answer(row)
        turns.append((question, row.text.strip()))


def test_the_generated_tokens_differ_from_those_of_the_text(tokenizer):
    tokenizer.chat_template = templates.CHATML
    *_, (written, read, _) = talk(tokenizer, ANSWERS)
    assert written != read


@pytest.mark.parametrize(
    ("template", "answer", "system"),
    [
        (templates.R1, "<think>\nhm</think>four", None),  # thoughts are left out later
        (templates.THINKING, "<think>\nhm</think>four", None),
        (templates.MISTRAL, "four", "be brief"),  # the system prompt moves
        (tokenizers.WORDS[0].join(["{{ messages | length }}", ""]), "four", None),
    ],
)
def test_a_template_that_writes_the_past_otherwise_is_followed(
    tokenizer, template, answer, system, monkeypatch
):
    tokenizer.chat_template = template
    monkeypatch.setattr("mllama.runtime.questions.check_system", lambda *given: None)
    for written, read, _ in talk(tokenizer, [answer] * 3, system=system):
        assert written == read


def test_an_answer_that_the_template_joins_with_its_own_is_kept_up_to_there(tokenizer):
    joined = tokenizer.encode(" colour", add_special_tokens=False)
    assert len(joined) == 1
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{{ 'lour' if m['role'] == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (_, first, answer), (written, second, _) = talk(tokenizer, ["ab co", ""])
    assert second[: len(first) + 3] == first + answer[:2] + joined
    assert tokenizer.decode(second) == tokenizer.decode(written)


def test_masks_follow_the_tokens(tokenizer):
    tokenizer.chat_template = templates.CHATML
    transcript = Transcript(tokenizer)

    def read(turns):
        inputs = dict(encode(tokenizer, None, "two red", turns))
        length = inputs["input_ids"].shape[1]
        rows = torch.arange(length)[None, :, None, None]
        return inputs, transcript.continue_with(inputs | {"cross_attention_mask": rows})

    first, _ = read([])
    answer = in_bytes(tokenizer, " blue circles")
    transcript.answer(Completion([*answer, 0], " blue circles", "eos"))
    written, found = read([("two red", "blue circles")])
    start = first["input_ids"].shape[1]
    ids, rows = found["input_ids"][0], found["cross_attention_mask"].flatten()
    assert rows[:start].tolist() == list(range(start))
    assert set(rows[start : start + len(answer)].tolist()) == {start}
    tail = rows[start + len(answer) :]
    assert torch.equal(written["input_ids"][0][tail], ids[start + len(answer) :])


def test_a_prompt_without_an_answer_is_forgotten(tokenizer):
    tokenizer.chat_template = templates.CHATML
    transcript = Transcript(tokenizer)
    first = transcript.continue_with(encode(tokenizer, None, "two red"))
    answer = in_bytes(tokenizer, " blue")
    transcript.answer(Completion(answer, "blue", "interrupted"))
    transcript.continue_with(encode(tokenizer, None, "stopped at once", [("two red", "blue")]))
    found = transcript.continue_with(encode(tokenizer, None, "a b", [("two red", "blue")]))
    known = first["input_ids"][0].tolist() + answer
    assert found["input_ids"][0].tolist()[: len(known)] == known
    transcript.reset()
    inputs = encode(tokenizer, None, "a b", [("two red", "blue")])
    assert torch.equal(transcript.continue_with(inputs)["input_ids"], inputs["input_ids"])


def test_tokens_of_a_stop_string_are_left_out(tokenizer):
    tokenizer.chat_template = templates.CHATML
    transcript = Transcript(tokenizer)
    first = transcript.continue_with(encode(tokenizer, None, "two red"))["input_ids"][0].tolist()
    answer = in_bytes(tokenizer, " blue circles")
    transcript.answer(Completion(answer, "blue ci", "stop"))
    turns = [("two red", "blue ci")]
    found = transcript.continue_with(encode(tokenizer, None, "a b", turns))["input_ids"][0]
    kept = answer[: len(" blue ci")]
    assert found[: len(first) + len(kept)].tolist() == first + kept
    assert found[len(first) + len(kept)] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_answer_that_was_changed_leaves_those_before_it_as_they_were(tokenizer):
    tokenizer.chat_template = templates.CHATML
    transcript, turns, known = Transcript(tokenizer), [], []
    for number, answer in enumerate(ANSWERS[:3]):
        read = transcript.continue_with(encode(tokenizer, None, QUESTIONS[number], turns))
        ids = read["input_ids"][0].tolist()
        transcript.answer(Completion(in_bytes(tokenizer, answer), answer, "length"))
        turns.append((QUESTIONS[number], "another text, of more than a few tokens"))
        assert ids[: len(known)] == known
        known = ids
