"""`mllama generate --runtime transformers`: stock transformers in place of the package."""

import argparse
from typing import Any

from mllama.api import check_answers, find_model, processor_of, resolve_dtype
from mllama.checkpoints import open_checkpoint
from mllama.cli._answering import check_reference, sampling, working
from mllama.device import choose_device
from mllama.hf.answering import GenerateSession
from mllama.hf.models import survey_opened
from mllama.hf.processors.auto import load_processor
from mllama.hf.stock import load_stock


def load_stock_session(arguments: argparse.Namespace) -> tuple[GenerateSession, dict[str, Any]]:
    """As `load_session`, with transformers' own model.

    Raises:
        ValueError: an option that is the package's alone.
    """
    for name in ("adapter", "kv_cache", "image_cache"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --runtime mllama")
    if arguments.weights not in ("auto", "none"):
        raise ValueError("--weights needs --runtime mllama")
    options = sampling(arguments)
    check_reference(arguments)
    if arguments.reference == "meta":
        raise ValueError(
            "--runtime transformers follows its own Llama-3.2-Vision: --reference must be hf, got "
            "meta"
        )
    folder, device = find_model(arguments.model), choose_device(arguments.device)
    with (opened := open_checkpoint(folder)).source:
        model, report = survey_opened(opened)
        check_answers(model)
        report.check(opened.source.where)  # transformers would initialize what is missing
        dtype = resolve_dtype(opened, arguments.dtype, device)
    with working("loading the model"):
        model = load_stock(folder, dtype).to(device)
        return GenerateSession(model, processor_of(folder, load_processor)), options
