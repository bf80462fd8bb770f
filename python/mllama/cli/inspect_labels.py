"""`mllama inspect-labels DATA`: each token of a row with its role and label, and a summary."""

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from mllama.api import find_model
from mllama.checkpoints import open_checkpoint
from mllama.cli._answering import check_reference
from mllama.data.collate import Collator
from mllama.data.ends import end_ids, missing_end
from mllama.data.labels import Summary, count_roles, label_tokens, summarize, token_lines
from mllama.data.sources import Examples, open_examples
from mllama.hf.processors.auto import load_processor
from mllama.model.model import VisionLanguageModel
from mllama.processing.auto import processor_of

_SHOWN = 5  # bad rows printed; --json prints all


def run(arguments: argparse.Namespace) -> int:
    """Print the labels; exit code 1 if rows of the summary cannot be trained on."""
    check_reference(arguments)
    collator, ends = _collator(arguments)
    examples = open_examples(
        arguments.data, arguments.image_folder, arguments.question, arguments.split
    )
    if arguments.row > len(examples):
        raise ValueError(f"--row must be at most {len(examples)}, got {arguments.row}")
    example = examples[arguments.row - 1]
    row = collator.encode(example)
    tokens = label_tokens(example, row, collator)
    summary = summarize(examples, collator, arguments.rows, ends)
    if arguments.json:
        found = {
            "where": row.where,
            "tokens": [dataclasses.asdict(token) for token in tokens],
            "counts": count_roles(tokens),
            "truncated": row.truncated,
            "summary": dataclasses.asdict(summary),
            "unread": examples.unread,
        }
        print(json.dumps(found))
    else:
        counts = ", ".join(f"{name} {count}" for name, count in count_roles(tokens).items())
        print(f"{row.where}: {len(row)} tokens")
        print(*token_lines(tokens, colors=sys.stdout.isatty()), sep="\n")
        print(f"tokens: {counts}")
        if row.truncated:
            print(f"cut off by --max-length: {row.truncated} tokens")
        print(*_summary_lines(summary, examples), sep="\n")
    if warning := missing_end(summary, collator, ends):
        print(f"mllama: {warning}", file=sys.stderr)
    return 1 if summary.bad_rows else 0


def _collator(arguments: argparse.Namespace) -> tuple[Collator, frozenset[int]]:
    """Of a model without its weights, which labels do not depend on; and the ids that end its
    answers.
    """
    folder = find_model(arguments.model)
    with (opened := open_checkpoint(folder)).source:
        spec = opened.spec
    if spec.text is None:
        raise ValueError("a SigLIP vision model has no decoder to train")
    with torch.device("meta"):
        model: Any = VisionLanguageModel(spec, arguments.reference or "meta")
    collator = Collator(model, processor_of(folder, load_processor), arguments.max_length)
    given = (opened.generation or {}).get("eos_token_id")
    return collator, end_ids(given, collator.tokenizer)


def _summary_lines(summary: Summary, examples: Examples) -> list[str]:
    looked = summary.rows + len(summary.bad_rows)
    lines = [f"the first {looked:,} of {len(examples):,} rows:"]
    if summary.rows:
        share = summary.trained / summary.tokens
        lines += [
            f"  {summary.tokens:,} tokens, of which {summary.trained:,} are trained ({share:.1%}); "
            f"images: {summary.images:,}",
            f"  the longest has {summary.longest:,} tokens ({summary.longest_row}); "
            f"rows that are cut: {summary.truncated:,}",
        ]
    if summary.bad_rows:
        more = len(summary.bad_rows) - _SHOWN
        lines.append(f"  {len(summary.bad_rows):,} rows cannot be trained on:")
        lines += [f"    {reason}" for reason in summary.bad_rows[:_SHOWN]]
        lines += [f"    and {more:,} more"] if more > 0 else []
    if examples.unread:
        lines.append(f"  not read: {', '.join(examples.unread)}")
    return lines
