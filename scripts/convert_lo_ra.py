"""LoRA adapters for a model folder: fresh ones, or trained ones merged into a new folder, as
`mllama lora merge` does.

python scripts/convert_lo_ra.py adapt MODEL adapters.safetensors --rank 8 --targets q_proj v_proj
python scripts/convert_lo_ra.py merge MODEL adapters.safetensors MERGED
"""

import argparse
import sys
from pathlib import Path

import mllama
from mllama import cli
from mllama.cli.lora import merge


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error is one line on stderr."""
    given = _parser().parse_args(arguments)
    cli.quieten()
    try:
        given.run(given)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"convert_lo_ra: error: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("convert_lo_ra", description="LoRA for a model folder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    adapt = commands.add_parser("adapt", help="write fresh adapters, which change nothing yet")
    adapt.set_defaults(run=_adapt)
    adapt.add_argument("model", metavar="MODEL", help="folder, GGUF file or id on the hub")
    adapt.add_argument("adapters", metavar="ADAPTERS", help="the file to write, *.safetensors")
    adapt.add_argument("--rank", type=int, default=8)
    adapt.add_argument("--alpha", type=float, default=16, help="scale is alpha / rank")
    adapt.add_argument("--targets", nargs="+", help="ends of layers' names (default: all)")
    adapt.add_argument("--part", default="language_model", help="of the model; '' is all of it")
    merge = commands.add_parser("merge", help="write a model folder with adapters merged")
    merge.set_defaults(run=_merge)
    merge.add_argument("model", metavar="MODEL")
    merge.add_argument("adapters", metavar="ADAPTERS", help="of mllama.save_lora, or PEFT's folder")
    merge.add_argument("target", metavar="OUT", help="folder to write")
    merge.add_argument("--force", action="store_true", help="OUT may have files")
    return parser


def _adapt(given: argparse.Namespace) -> None:
    model = mllama.MllamaForConditionalGeneration.from_pretrained(given.model)
    parts = [name for name, _ in model.named_children()]
    if given.part and given.part.split(".")[0] not in parts:
        raise ValueError(f"--part: the model has no {given.part}; its parts are {', '.join(parts)}")
    made = mllama.convert_linears_to_lora(
        model.get_submodule(given.part), given.rank, given.alpha, target_module_names=given.targets
    )
    mllama.save_lora(model, given.adapters)
    trained = sum(parameter.numel() for parameter in mllama.lora_parameters(model))
    frozen = model.num_parameters() - trained
    learning = f"{len(made)} layers, {trained:,} parameters that learn beside {frozen:,}"
    print(f"{given.adapters}: {learning}")


def _merge(given: argparse.Namespace) -> None:
    merged = merge(given.model, given.adapters, Path(given.target), force=given.force)
    print(f"{given.target}: the {merged.config.model_type} with its adapters merged")


if __name__ == "__main__":
    main()
