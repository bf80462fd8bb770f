"""The arguments of every command. Imports argparse and the keys of `mllama train`."""

import argparse

from mllama import __version__
from mllama.cli._arguments import Parser, add_command, add_count, add_placed, number, some_text
from mllama.cli._data_arguments import add_inspect_labels
from mllama.cli._evaluation import add_eval, add_plan
from mllama.cli._lora_arguments import add_lora
from mllama.cli._options import (
    DTYPES,
    WEIGHTS,
    add_adapter,
    add_answering,
    add_device,
    add_folder,
    add_model,
    add_name,
    add_reference,
)
from mllama.cli._training import add_train

SIZES = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "3B": "meta-llama/Llama-3.2-3B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "11B": "meta-llama/Llama-3.2-11B-Vision-Instruct",
}
GGUF_DTYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_k")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Its result has `command` and that command's arguments."""
    whole = "Errors are one line; set MLLAMA_TRACEBACK=1 in the environment for the traceback."
    parser = Parser(
        prog="mllama",
        description="Vision-language models of the Llama family: ask, chat, train, verify.",
        epilog=whole,
    )
    parser.add_argument("--version", action="version", version=f"mllama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_ask,
        _add_chat,
        _add_generate,
        _add_download,
        _add_convert,
        _add_quantize,
        add_lora,
        _add_inspect,
        add_inspect_labels,
        _add_verify,
        add_train,
        add_plan,
        add_eval,
        _add_info,
    ):
        add(commands)
    return parser


def _add_ask(commands) -> None:
    parser = add_command(
        commands, "ask", "answer one question about one or several images, or without an image"
    )
    parser.usage = "mllama ask [options] [IMAGE ...] QUESTION"
    parser.add_argument(
        "words",
        metavar="IMAGE, QUESTION",
        nargs="+",
        help="image files ('-': stdin), then the question in quotes ('-': from stdin); for "
        "PaliGemma a prefix such as 'caption en'",
    )
    add_model(parser)
    add_answering(parser, "print one JSON object instead of streaming the answer")


def _add_chat(commands) -> None:
    parser = add_command(
        commands,
        "chat",
        "chat about images or in text alone, one question per line; /help lists the commands",
    )
    parser.add_argument(
        "words",
        metavar="IMAGE",
        nargs="*",
        help="image files; without one the conversation is text only",
    )
    add_model(parser, several=True)
    add_answering(parser, "print one JSON object per answer, one per line")


def _add_generate(commands) -> None:
    parser = add_command(commands, "generate", "continue a prompt, with any number of images")
    which = parser.add_mutually_exclusive_group()
    add_name(which)
    which.add_argument(
        "--size", choices=SIZES, help="Meta's instruct model of this size, instead of --model"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        type=some_text,
        metavar="TEXT",
        help="the prompt; put through the model's chat template if it has one",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image; may be given several times",
    )
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    parser.add_argument(
        "--do-sample",
        action="store_true",
        help="sample, with the options below or the model's own settings",
    )
    parser.add_argument(
        "--runtime",
        choices=("mllama", "transformers"),
        default="mllama",
        help="transformers: run transformers' own class on the same inputs, for comparison",
    )
    add_answering(parser, "print one JSON object instead of streaming the answer")
    add_adapter(parser)
    device = add_device(parser)
    device.add_argument(
        "--cpu", dest="device", action="store_const", const="cpu", help="the same as --device cpu"
    )


def _add_download(commands) -> None:
    parser = add_command(
        commands,
        "download",
        "fetch a model's config, tokenizer and weights from the hub into a folder",
    )
    add_placed(parser, "id", "ID", "such as meta-llama/Llama-3.2-1B-Instruct")
    parser.add_argument("folder", metavar="DIR", help="the target folder; created if needed")


def _add_convert(commands) -> None:
    parser = add_command(
        commands, "convert", "write a model, with its tokenizer or processor, in another format"
    )
    add_placed(
        parser,
        "source",
        "IN",
        "a folder of Hugging Face's or Meta's files, a GGUF file or a model id on the hub",
    )
    parser.add_argument(
        "target", metavar="OUT", help="a folder, or a file for --to gguf; written atomically"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "llava", "gguf"),
        help="hf: the family's own format; llava: the same, rejected for other models; gguf: "
        "the decoder, for llama.cpp",
    )
    add_adapter(parser)
    kinds = (
        f"for a folder {', '.join(DTYPES)} (default: auto, as in IN); for gguf "
        f"{', '.join(GGUF_DTYPES)} (default: f16)"
    )
    parser.add_argument("--dtype", choices=(*DTYPES, *GGUF_DTYPES), metavar="TYPE", help=kinds)
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite OUT; in a folder, files that are not part of a model stay",
    )


def _add_quantize(commands) -> None:
    parser = add_command(
        commands,
        "quantize",
        "write a model with packed weights, and report what that costs in accuracy",
    )
    add_placed(
        parser,
        "source",
        "IN",
        "a folder of Hugging Face's or Meta's files, a GGUF file or a model id on the hub",
    )
    parser.add_argument("target", metavar="OUT", help="a folder; written atomically")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS[2:],
        default="int4",
        help="the weights' format, as for ask and chat (default: int4)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of norms and biases (default: auto, as in IN)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="a text for which the codes of int4 are chosen, by GPTQ: less error, and more time",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="a text to compare both models on (default: a part of Python's documentation)",
    )
    add_adapter(parser, "merged into the weights before they are packed")
    parser.add_argument("--no-report", action="store_true", help="do not compare them")
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite OUT; files that are not part of a model stay",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def _add_inspect(commands) -> None:
    parser = add_command(
        commands,
        "inspect",
        "print a model's family, sizes, parameters, memory and loading problems",
    )
    add_folder(parser)
    add_adapter(parser, "what it adapts and adds; exit code 1 if it does not fit")
    context = "tokens per row (default: 4096, or the model's maximum)"
    add_count(parser, "--context", context)
    add_count(parser, "--batch", "rows", default=1)
    tiles = "tiles of a row's images, or images if the model has no tiles (default: one image)"
    add_count(parser, "--tiles", tiles, least=0)
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="dtype to load it in (default: auto, as in the files)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, with the names of all loading problems",
    )


def _add_verify(commands) -> None:
    parser = add_command(
        commands,
        "verify",
        "compare a model, stage by stage, with stock transformers, and cached and batched runs "
        "with plain ones",
    )
    add_folder(parser)
    add_adapter(parser, "transformers is then compared with the adapter of PEFT")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES[1:], help="dtype of both (default: float32)"
    )
    add_reference(
        parser,
        "reference for the cached and batched runs of Llama-3.2-Vision (default: meta); the "
        "comparison with transformers always uses hf",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**64 - 1),
        default=0,
        metavar="N",
        help="seed of the random tokens and pixels (default: 0)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_info(commands) -> None:
    parser = add_command(
        commands, "info", "print installed versions and the machine's capabilities"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
