"""`Inference/Inference.py`: one question about one picture. It is `mllama generate` with its older
defaults.
"""

import argparse

from mllama import cli
from mllama.cli._parser import DTYPES, SIZES


def main(arguments: list[str]) -> int:
    """Print the answer; returns the exit code."""
    asked = _parser().parse_args(arguments)
    command = {
        "--model-id": asked.hf_weights or asked.model_id or SIZES["11B"],
        "--prompt": asked.prompt,
        "--image": asked.image,
        "--max-new-tokens": asked.max_new_tokens,
        "--temperature": asked.temperature,
        "--top-p": asked.top_p,
        "--top-k": asked.top_k,
        "--dtype": asked.dtype,
    }
    options = [f"{name}={value}" for name, value in command.items() if value is not None]
    return cli.main(["generate", *options, *(["--cpu"] if asked.cpu else [])])


def _parser() -> argparse.ArgumentParser:
    """Values are checked by `mllama generate`, whose options they become."""
    parser = argparse.ArgumentParser(
        prog="Inference.py", description="Ask a vision-language model about a picture."
    )
    parser.add_argument("--image", required=True, metavar="FILE", help="the picture")
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="the question; put through the model's chat template",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model-id", metavar="ID", help=f"on the hub, or a local folder (default: {SIZES['11B']})"
    )
    which.add_argument("--hf-weights", metavar="DIR", help="a local folder, in place of --model-id")
    parser.add_argument(
        "--max-new-tokens",
        default="128",
        metavar="N",
        help="the longest answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        default="0.0",
        metavar="T",
        help="0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        default="1.0",
        metavar="P",
        help="where the temperature is above 0 (default: %(default)s)",
    )
    parser.add_argument("--top-k", metavar="K", help="where the temperature is above 0")
    parser.add_argument("--cpu", action="store_true", help="the CPU even where there is a GPU")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="auto is by the device (default: %(default)s)",
    )
    return parser
