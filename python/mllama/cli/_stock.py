"""`mllama generate --runtime transformers`: stock transformers in place of the package."""

import argparse
import time

from mllama.api import check_answers, find_model
from mllama.checkpoints import open_checkpoint
from mllama.cli._answering import Loaded, check_reference, sampling
from mllama.cli._status import Status
from mllama.device import choose_device
from mllama.hf.answering import GenerateSession
from mllama.hf.models import survey_opened
from mllama.hf.processors.auto import load_processor
from mllama.hf.stock import load_stock
from mllama.processing.auto import processor_of
from mllama.runtime.progress import LOAD


def load_stock_session(arguments: argparse.Namespace) -> Loaded:
    """As `load_session`, with transformers' own model.

    Raises:
        ValueError: an option that is the package's alone.
    """
    own = ("adapter", "kv_cache", "image_cache", "prompt_lookup", "draft_model", "gpu_layers")
    for name in own:
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
        dtype = opened.resolve_dtype(arguments.dtype, device)
    start = time.perf_counter()
    with Status(streams=not arguments.json) as status:
        status(LOAD, 0, 0)
        model = load_stock(folder, dtype).to(device)
        session = GenerateSession(model, processor_of(folder, load_processor), status)
    return Loaded(session, options, status, time.perf_counter() - start)
