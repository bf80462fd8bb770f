import time

import pytest

from mllama.processing.template import MAX_CHARACTERS, render

MESSAGES = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
TEMPLATES = [
    "{% for m in messages %}  {{ m.content | tojson }}\n  {% break %}{% endfor %}{{ bos_token }}",
    "{% for m in messages %}{% generation %}{{ m['role'] }}{% endgeneration %}\n{% endfor %}",
    "{% set ns = namespace(x=1) %}{% set ns.x = dict(a='ü<&') %}{{ ns.x | tojson(indent=2) }}",
    "{{ messages[1].thinking }} {{ messages[1].reasoning_content }} {{ tools }} {{ documents }}",
    "{{ strftime_now('%Y') }}{{ '!' if add_generation_prompt }}",
    "{% macro f(x) -%} {{ x }} {%- endmacro %}{{ f(1) ~ f(2) }}{% for a in [[1], [2]] recursive %}"
    "{{ loop(a) if a is not number else a }}{% endfor %}",
]


@pytest.mark.parametrize("template", [*TEMPLATES, "llama"])
def test_as_transformers(make_llama_tokenizer, llama_template, template):
    tokenizer = make_llama_tokenizer()
    template = llama_template if template == "llama" else template
    messages = [MESSAGES[0], MESSAGES[1] | {"reasoning": "because"}]
    stock = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert render(template, tokenizer.special_tokens_map, messages) == stock != ""


def test_long_conversations_are_no_attack(llama_template):
    assert len(render(llama_template, {"bos_token": "b"}, MESSAGES * 2000)) > 4000 * 50


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
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% macro f(n) %}{{ f(n + 1) if n < 60 }}{{ f(n + 1) if n < 60 }}{% endmacro %}{{ f(0) "
            "}}",
            "steps",
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
def test_attacks(template, match):
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template fails: .*{match}"):
        render(template, {}, MESSAGES)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "inner",
    ["messages.__class__", "raise_exception.__globals__", "bos_token.__init__", "self.__dict__"],
)
def test_templates_see_no_insides(inner):
    assert render("a{{ " + inner + " }}b", {"bos_token": "<s>"}, MESSAGES) == "ab"
