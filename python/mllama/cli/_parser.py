"""The arguments of every command. Imports argparse only."""

import argparse

from mllama import __version__
from mllama.cli._arguments import Parser, add_command, add_drafts, add_placed, number, some_text

SIZES = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "3B": "meta-llama/Llama-3.2-3B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
    "11B": "meta-llama/Llama-3.2-11B-Vision-Instruct",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
GGUF_DTYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_k")
KV_CACHES = ("int8", "bf16", "f16", "f32")  # nn.kv_cache's CACHE_DTYPES
# quant.packer's AUTO, FILE and RECIPES; "none" packs nothing
WEIGHTS = ("auto", "none", "file", "int4", "int8", "bf16", "f16", "f32")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Its result has `command` and that command's arguments."""
    whole = "Errors are one line; set MLLAMA_TRACEBACK=1 in the environment for the traceback."
    parser = Parser(
        prog="mllama",
        description="Vision-language models of the Llama family: ask, chat, inspect, verify.",
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
        _add_inspect,
        _add_verify,
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
    _add_model(parser)
    _add_answering(parser, "print one JSON object instead of streaming the answer")


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
    _add_model(parser)
    _add_answering(parser, "print one JSON object per answer, one per line")


def _add_generate(commands) -> None:
    parser = add_command(commands, "generate", "continue a prompt, with any number of images")
    which = parser.add_mutually_exclusive_group()
    _add_name(which)
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
    _add_answering(parser, "print one JSON object instead of streaming the answer")
    _add_adapter(parser)
    device = _add_device(parser)
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
    _add_folder(parser)
    parser.add_argument(
        "--context",
        type=number(int, 1),
        metavar="N",
        help="tokens per row (default: 4096, or the model's maximum)",
    )
    parser.add_argument(
        "--batch", type=number(int, 1), default=1, metavar="N", help="rows (default: 1)"
    )
    parser.add_argument(
        "--tiles",
        type=number(int, 0),
        metavar="N",
        help="tiles of a row's images, or images if the model has no tiles (default: one image)",
    )
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
    _add_folder(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES[1:], help="dtype of both (default: float32)"
    )
    _add_reference(
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


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    _add_adapter(parser)
    _add_device(parser)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        metavar="PATH",
        help="LoRA adapters for the model: a file of mllama.save_lora, or a PEFT folder",
    )


def _add_name(parser) -> None:
    help = "a model folder, a GGUF file or a model id on the hub (default: the embedded model)"
    parser.add_argument("--model-id", "--model", dest="model", metavar="MODEL", help=help)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    what = (
        "a folder of Hugging Face's or Meta's files, a GGUF file or a model id on the hub "
        "(default: the embedded model)"
    )
    add_placed(parser, "folder", "MODEL", what, required=False)


def _add_device(parser: argparse.ArgumentParser):
    """Add --device, --dtype and --reference; returns --device's group, for its aliases."""
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="default: auto, chosen for the device"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="pack the weights: fewer bits, and more tokens per second; file: in the "
        "file's own types, such as GGUF's blocks; auto (default): the same, float32 in --dtype, "
        "where no adapter or other device forbids it; none: as tensors",
    )
    parser.add_argument(
        "--gpu-layers",
        type=number(int, 0),
        metavar="N",
        help="for a model that does not fit the GPU: keep the weights of the decoder's first N "
        "layers there, the others' in the host's memory, from where every pass copies them",
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        help="store keys and values so (default: in the weights' dtype); int8: 8.5 bits a value",
    )
    parser.add_argument(
        "--image-cache",
        type=some_text,
        metavar="DIR",
        help="keep what is computed of images in files of this folder, at most 8 GiB, for later "
        "calls",
    )
    _add_reference(
        parser, "meta: Llama-3.2-Vision as trained (default); hf: as transformers computes it"
    )
    return device


def _add_reference(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--reference", choices=("meta", "hf"), help=what)


def _add_answering(parser: argparse.ArgumentParser, json: str) -> None:
    """Arguments of all commands that generate answers."""
    parser.add_argument(
        "--system", metavar="TEXT", help="system prompt, for models whose chat template has one"
    )
    parser.add_argument(
        "--allow-urls", action="store_true", help="download images given as http(s) URLs"
    )
    _add_sampling(parser)
    add_drafts(parser)
    parser.add_argument(
        "--timings",
        action="store_true",
        help="print how long each stage of an answer took to stderr; with --json as its fields",
    )
    parser.add_argument("--json", action="store_true", help=json)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=number(int, 1),
        metavar="N",
        help="maximum length of the answer in tokens (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0),
        metavar="T",
        help="sample with this temperature (0: greedy)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        metavar="P",
        help="sample from the likeliest tokens whose probabilities add up to P",
    )
    parser.add_argument(
        "--top-k", type=number(int, 1), metavar="K", help="sample from the K likeliest tokens"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, 2**64 - 1), metavar="N", help="seed of the random numbers"
    )
