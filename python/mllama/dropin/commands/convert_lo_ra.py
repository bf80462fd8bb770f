"""LoRA adapters for a model folder: fresh ones to begin training with, or trained ones merged into
a folder of their own.

    python -m mllama.dropin convert_lo_ra adapt MODEL adapters.safetensors --rank 8 --alpha 16
    --targets q_proj v_proj python -m mllama.dropin convert_lo_ra merge MODEL adapters.safetensors
    MERGED

MODEL is what `MllamaForConditionalGeneration.from_pretrained` takes. A training script begins with
`mllama.load_lora(model, "adapters.safetensors")`, which converts the model and puts the adapters
in.
"""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

import mllama
from mllama.checkpoints.files import write_folder
from mllama.checkpoints.hub import find_folder


def main(arguments: list[str]) -> int:
    """Run a command; returns the exit code."""
    run(arguments)
    return 0


def run(arguments: list[str] | None = None) -> None:
    """Run a command, of sys.argv by default."""
    chosen = parser().parse_args(arguments)
    logging.set_verbosity_error()
    chosen.run(chosen)


def parser() -> argparse.ArgumentParser:
    """Of both commands."""
    whole = argparse.ArgumentParser(
        prog="convert_lo_ra", description="LoRA adapters for a model folder."
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    adapt = commands.add_parser(
        "adapt", help="write fresh adapters, which change nothing until they are trained"
    )
    adapt.set_defaults(run=run_adapt)
    adapt.add_argument(
        "model", metavar="MODEL", help="a model folder, a GGUF file or an id on the hub"
    )
    adapt.add_argument("adapters", metavar="ADAPTERS", help="the file to write, *.safetensors")
    adapt.add_argument("--rank", type=int, default=8, help="width of the adapters (default: 8)")
    adapt.add_argument(
        "--alpha", type=float, default=16, help="they count alpha / rank times (default: 16)"
    )
    adapt.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="layers by the ends of their names, as q_proj (default: all)",
    )
    adapt.add_argument(
        "--part",
        default="language_model",
        help="of the model (default: language_model); '' is all of it, the tower too",
    )

    merge = commands.add_parser(
        "merge", help="write a model folder with the adapters in its weights"
    )
    merge.set_defaults(run=run_merge)
    merge.add_argument("model", metavar="MODEL", help="what the adapters were trained on")
    merge.add_argument(
        "adapters", metavar="ADAPTERS", help="a file of mllama.save_lora, or PEFT's folder"
    )
    merge.add_argument(
        "target", metavar="OUT", help="the folder to write; it must be empty or absent"
    )
    return whole


def run_adapt(chosen: argparse.Namespace) -> None:
    """Convert the model, and save its fresh adapters."""
    model = mllama.MllamaForConditionalGeneration.from_pretrained(chosen.model)
    try:
        part = model.get_submodule(chosen.part)
    except AttributeError:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"--part: the model has no {chosen.part}; its parts are {parts}") from None
    made = mllama.convert_linears_to_lora(
        part, chosen.rank, chosen.alpha, target_module_names=chosen.targets
    )
    mllama.save_lora(model, chosen.adapters)
    learning = sum(parameter.numel() for parameter in mllama.lora_parameters(model))
    print(
        f"{chosen.adapters}: {len(made)} layers, {learning:,} parameters that learn beside {model.num_parameters() - learning:,}"
    )


def run_merge(chosen: argparse.Namespace) -> None:
    """Load both, add one to the other, and save the sum with the model's processor."""
    target = Path(chosen.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder")
    source = find_folder(chosen.model)
    model = mllama.MllamaForConditionalGeneration.from_pretrained(source)
    try:
        processor = mllama.load_processor(source)
    except FileNotFoundError as error:
        print(f"convert_lo_ra: no tokenizer or processor is written: {error}", file=sys.stderr)
        processor = None
    mllama.load_lora(model, chosen.adapters)
    mllama.merge_and_unload(model)

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)

    write_folder(target, write)
    print(f"{target}: the {model.config.model_type} with its adapters merged")
