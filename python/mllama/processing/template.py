"""Chat templates come with models, from anyone: they are rendered in jinja2's immutable sandbox
(transformers' own), and bounded.
"""

import sys
from collections.abc import Sequence

from jinja2 import Environment

MAX_STEPS = 1_000_000  # a released template takes some dozens for a message
MAX_CHARACTERS = 2**24
_MAX_NUMBER = 100_000  # jinja2's own bound of range()


def render(processor, messages: Sequence[dict]) -> str:
    """Return the prompt that the chat template of a processor or tokenizer writes for messages, up
    to the model's turn.

    The sandbox keeps a template from the interpreter's insides, and ends range() at 100 000. Beyond
    it: no `**` and no larger number, which one step would turn into gigabytes; at most MAX_STEPS
    lines of the compiled template; at most MAX_CHARACTERS of result. What a template
    holds in between is not bounded: one that doubles a text in steps can still fill the memory.

    Raises:
        ValueError: the template fails, or exceeds a bound.
    """
    try:
        _check_numbers(processor)
        with _Steps(MAX_STEPS):
            prompt = processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"it wrote {len(prompt)} characters, more than {MAX_CHARACTERS}")
    # a template fails in its own ways: TemplateError, TypeError, OverflowError, RecursionError ...
    except Exception as error:
        raise ValueError(f"the chat template fails: {error}") from error
    return prompt


def _check_numbers(processor) -> None:
    templates = processor.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        for _, kind, value in Environment().lex(template):
            if (kind, value) == ("operator", "**") or (
                kind == "integer" and int(value.replace("_", ""), 0) > _MAX_NUMBER
            ):
                raise ValueError(
                    f"{value} is not accepted in a template: numbers end at {_MAX_NUMBER}"
                )


class _Steps:
    """Raises TimeoutError in this thread once compiled templates have run so many lines."""

    def __init__(self, most: int):
        self.left = most

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._enter)

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _enter(self, frame, event, argument):
        return self._step if frame.f_code.co_filename == "<template>" else None

    def _step(self, frame, event, argument):
        self.left -= 1
        if self.left < 0:
            raise TimeoutError(f"it takes more than {MAX_STEPS} steps")
        return self._step
