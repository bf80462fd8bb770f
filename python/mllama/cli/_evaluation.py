"""The arguments of `plan` and `eval`. Imports argparse and the keys of `train`."""

from mllama.cli._arguments import add_command, add_count, some_text
from mllama.cli._data_arguments import add_data
from mllama.cli._options import add_model
from mllama.cli._training import add_settings

# evaluate.run's KNOWN and DEFAULT
METRICS = ("perplexity", "vqa_accuracy", "anls", "exact_match", "bleu4", "rouge_l", "cider")
DEFAULT_METRICS = ("exact_match", "vqa_accuracy", "perplexity")


def add_eval(commands) -> None:
    """Add `eval`."""
    parser = add_command(
        commands, "eval", "answer the questions of a data set and score the answers"
    )
    add_data(parser)
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help="leave out rows that cannot be read, and name them; otherwise they are an error",
    )
    add_count(parser, "--limit", "evaluate the first N rows")
    add_model(parser)
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=list(DEFAULT_METRICS),
        metavar="NAME",
        help=f"any of {', '.join(METRICS)} (default: {' '.join(DEFAULT_METRICS)}); the page of "
        "worst rows is sorted by the first",
    )
    add_count(parser, "--max-new-tokens", "maximum length of an answer in tokens", default=64)
    add_count(parser, "--batch-size", "rows that are answered together", default=8)
    add_count(parser, "--max-length", "cut rows to N tokens for perplexity", least=2)
    parser.add_argument(
        "--output", type=some_text, metavar="FOLDER", help="write report.json and worst.html there"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object")


def add_plan(commands) -> None:
    """Add `plan`."""
    parser = add_command(
        commands, "plan", "print the memory that a run of train needs, and what would need less"
    )
    parser.usage = "mllama plan [CONFIG.yaml] [--memory SIZE] [--json] [--KEY VALUE ...]"
    parser.epilog = "Exit code 1 if the run does not fit. No weight is read."
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a config of mllama train; before flags"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=some_text,
        help="the memory that there is, such as 8GB (default: what is free on the device)",
    )
    length = "tokens of every row (default: those of the longest of the first 100 rows)"
    add_count(parser, "--length", length, least=2)
    parser.add_argument(
        "--switches", action="store_true", help="try other settings where the run fits, too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser)
