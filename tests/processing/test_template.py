import sys
import time

import pytest
from transformers import PreTrainedTokenizerFast

from mllama.processing.template import MAX_CHARACTERS, render

MESSAGES = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]


@pytest.fixture
def tokenizer(make_llama_tokenizer) -> PreTrainedTokenizerFast:
    return make_llama_tokenizer()


def test_as_transformers(tokenizer, llama_template):
    tokenizer.chat_template = llama_template
    assert render(tokenizer, MESSAGES) == tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, tokenize=False
    )


def test_tracing_is_put_back(tokenizer):
    def trace(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        tokenizer.chat_template = "a"
        assert render(tokenizer, MESSAGES) == "a" and sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_long_conversations_are_no_attack(tokenizer, llama_template):
    tokenizer.chat_template = llama_template
    assert len(render(tokenizer, MESSAGES * 2000)) > 4000 * 50


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{{ (messages | attr('__class__')).x }}", "unsafe"),
        ("{{ namespace.__init__.__globals__['x'] }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% for i in range(100000 * 10000) %}x{% endfor %}", "Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1000000 steps",
        ),
        (
            "{% macro f(n) %}{{ f(n + 1) if n < 60 }}{{ f(n + 1) if n < 60 }}{% endmacro %}{{ f(0) }}",
            "more than 1000000 steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 10 ** 10 }}", r"\*\* is not accepted"),
        ("{{ 'a' * 10000000000 }}", "10000000000 is not accepted"),
        ("{{ 'a' * 0xFFFFFFFFFF }}", "0xFFFFFFFFFF is not accepted"),
        ("{{ 'a' | center(10_000_000_000) }}", "10_000_000_000 is not accepted"),
        ("{{ 'a' * (8192 * 4096) }}", f"more than {MAX_CHARACTERS}"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{% include 'a' %}", "no loader"),
        ("{{", "unexpected"),
        ("{{ raise_exception('no such thing') }}", "no such thing"),
    ],
)
def test_attacks(tokenizer, template, match):
    tokenizer.chat_template = template
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template fails: .*{match}"):
        render(tokenizer, MESSAGES)
    assert time.monotonic() - started < 20 and sys.gettrace() is None


@pytest.mark.parametrize(
    "inner",
    ["messages.__class__", "raise_exception.__globals__", "bos_token.__init__", "self.__dict__"],
)
def test_templates_see_no_insides(tokenizer, inner):
    tokenizer.chat_template = "a{{ " + inner + " }}b"
    assert render(tokenizer, MESSAGES) == "ab"
