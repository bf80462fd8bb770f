"""The command lines of older projects; `python -m mllama.dropin NAME` runs one.

Each takes its arguments and returns the exit code. An error is one line on stderr and code 2.
"""

import argparse
import os
import sys
from collections.abc import Callable

import mllama
from mllama import cli
from mllama.cli._arguments import number
from mllama.processing.image import load_image


class _Parser(argparse.ArgumentParser):
    """Raises ValueError with one line, instead of printing the usage too."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def vision(arguments: list[str]) -> int:
    """`Inference/Inference.py`: `mllama generate` with other defaults."""
    defaults = {
        "model-id": "meta-llama/Llama-3.2-11B-Vision-Instruct",
        "max-new-tokens": 128,
        "temperature": 0.0,
        "top-p": 1.0,
        "dtype": "auto",
    }
    options = [f"--{name}={value}" for name, value in defaults.items()]
    return cli.main(["generate", *options, *arguments])


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


# By the file that had the command line; its stem is a name too.
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "Inference/Inference.py": vision,
    "inference.py": inference,
    "dev/inference.py": inference,
    "dev/launch_inference.sh": launch,
    "dev/get_tokenizer.py": get_tokenizer,
}


def run(name: str) -> int:
    """Run a command with sys.argv's arguments, as the older file itself did."""
    return cli.run_told(lambda: COMMANDS[name](sys.argv[1:]))
