"""The tokens that an answer stops at, which a model learns from answers that end with one."""

from typing import Any

from mllama.data.collate import Collator
from mllama.data.labels import Summary
from mllama.runtime.checks import check_ends


def end_ids(given: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer, as `runtime.session.Session` chooses them.

    Args:
        given: eos_token_id of the model's generation settings: an id, several, or None.
        tokenizer: has the id that counts without settings.

    Raises:
        TypeError: given is something else.
    """
    ends = check_ends(tokenizer.eos_token_id if given is None else given)
    return frozenset(end for end in ends if end >= 0)


def missing_end(summary: Summary, collator: Collator, ends: frozenset[int]) -> str | None:
    """A warning where no answer of a summary's rows ends with one of the model's ends; None where
    one does, and where max_length may have cut all of them off.
    """
    if not ends or summary.ended or summary.rows == summary.truncated:
        return None
    tokenizer = collator.tokenizer
    known = tokenizer.eos_token_id in ends
    end = tokenizer.eos_token if known else tokenizer.decode([min(ends)])
    has_template = getattr(collator.processor, "chat_template", None) is not None
    writer, remedy = (
        ("chat template", ", or change the chat template") if has_template else ("processor", "")
    )
    return (
        f"no answer of the first {summary.rows} row(s) ends with a token that generation stops at, "
        f"so none teaches the model to stop: the {writer} trains no {end!r} after an answer; end "
        f"the answers' texts with it{remedy}"
    )
