"""The command lines of older projects; `python -m mllama.dropin NAME` runs one.

Each takes its arguments and returns the exit code. An error is one line on stderr and code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import mllama
from mllama import cli
from mllama.checkpoints.files import write_folder
from mllama.checkpoints.hub import find_folder
from mllama.cli._parser import number
from mllama.processing.image import load_image


class _Parser(argparse.ArgumentParser):
    """Raises ValueError with one line, instead of printing the usage too."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def vision(arguments: list[str]) -> int:
    """`Inference/Inference.py`: `mllama generate`, which checks the values."""
    parser = _Parser(prog="Inference.py", description="Ask a model about an image.")
    parser.add_argument("--image", required=True, metavar="FILE")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    model = parser.add_mutually_exclusive_group()
    default = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    model.add_argument("--model-id", default=default, help="id on the hub, or a folder")
    model.add_argument("--hf-weights", metavar="DIR", dest="model_id", help="the same")
    for name, value in (("max-new-tokens", "128"), ("temperature", "0.0"), ("top-p", "1.0")):
        parser.add_argument(f"--{name}", default=value, help="default: %(default)s")
    parser.add_argument("--top-k")
    parser.add_argument("--dtype", default="auto", help="auto (by the device), float32 ...")
    parser.add_argument("--cpu", action="store_true", help="the CPU even where there is a GPU")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value}
    cpu = ["--cpu"] if given.pop("cpu", False) else []
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return cli.main(["generate", *options, *cpu])


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text == "True"


def _inference_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="inference.py", description="Ask a model.", allow_abbrev=False)
    parser.add_argument("--model_path", default="", help="folder, GGUF file or id; '': embedded")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--image_file_path", default="")
    parser.add_argument("--max_tokens_to_generate", type=number(int, 1), default=100)
    parser.add_argument("--temperature", type=number(float, 0), default=0.8)
    parser.add_argument("--top_p", type=number(float, 0, 1, above=True), default=0.9)
    for name in ("--do_sample", "--only_cpu"):
        parser.add_argument(name, type=_truth, nargs="?", const=True, default=False)
    return parser


def inference(arguments: list[str]) -> int:
    """`inference.py`: one answer, about an image or from text alone."""
    given = _inference_parser().parse_args(arguments)
    if not given.prompt:
        raise ValueError("--prompt is missing; give the question")
    image = load_image(given.image_file_path) if given.image_file_path else None
    options = {"max_new_tokens": given.max_tokens_to_generate, "do_sample": given.do_sample}
    sampling = {"temperature": given.temperature, "top_p": given.top_p}
    if given.do_sample:
        options |= sampling | {"top_k": 0}
    elif sampling != {"temperature": 0.8, "top_p": 0.9}:  # launch_inference.sh always gives them
        print("mllama: no --do_sample True: temperature and top_p have no effect", file=sys.stderr)
    if all(map(os.environ.get, ("COMET_API_KEY", "COMET_PROJECT_NAME", "COMET_WORKSPACE"))):
        print("mllama: this run is not logged to Comet", file=sys.stderr)
    cli.quieten()
    model, processor = mllama.load(
        given.model_path or None, device="cpu" if given.only_cpu else "auto"
    )
    answer = mllama.ask(image, given.prompt, model, processor, **options)
    print(f"User Input: {given.prompt}\nAI Response: {answer}")
    return 0


def launch(arguments: list[str]) -> int:
    """`dev/launch_inference.sh`: `inference.py` with options from MODEL_PATH, PROMPT and so on."""
    names = vars(_inference_parser().parse_args([]))
    found = {name: os.environ.get(name.upper()) for name in names}
    return inference([f"--{name}={value}" for name, value in found.items() if value] + arguments)


def get_tokenizer(arguments: list[str]) -> int:
    """`dev/get_tokenizer.py`: `mllama download ID DIR`, by default of PaliGemma."""
    name = "paligemma-3b-pt-224"
    return cli.main(
        ["download", *(arguments or [f"google/{name}", f"models/paligemma-weights/{name}"])]
    )


def convert_lo_ra(arguments: list[str]) -> int:
    """`scripts/convert_lo_ra.py`: fresh adapters for a model, or a model with adapters merged."""
    parser = _Parser(prog="convert_lo_ra", description="LoRA adapters for a model folder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
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
    merge.add_argument("target", metavar="OUT", help="folder to write; empty or absent")
    given = parser.parse_args(arguments)
    cli.quieten()
    given.run(given)
    return 0


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
    target = Path(given.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder")
    source = find_folder(given.model)
    model = mllama.MllamaForConditionalGeneration.from_pretrained(source)
    parts = [model]
    try:
        parts.append(mllama.load_processor(source))
    except FileNotFoundError as error:
        print(f"convert_lo_ra: no tokenizer or processor is written: {error}", file=sys.stderr)
    mllama.load_lora(model, given.adapters)
    mllama.merge_and_unload(model)
    write_folder(target, lambda aside: [part.save_pretrained(aside) for part in parts])
    print(f"{target}: the {model.config.model_type} with its adapters merged")


# By the file that had the command line; its stem is a name too.
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "Inference/Inference.py": vision,
    "inference.py": inference,
    "dev/inference.py": inference,
    "dev/launch_inference.sh": launch,
    "dev/get_tokenizer.py": get_tokenizer,
    "scripts/convert_lo_ra.py": convert_lo_ra,
}


def run(name: str) -> int:
    """Run a command with sys.argv's arguments, as the older file itself did."""
    return cli.run_told(lambda: COMMANDS[name](sys.argv[1:]))
