"""Options that several commands share. Imports argparse and os only."""

import argparse
import os

from mllama.cli._arguments import add_count, add_drafts, add_placed, number, some_text

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHES = ("int8", "bf16", "f16", "f32")  # nn.kv_cache's CACHE_DTYPES
# quant.packer's AUTO, FILE and RECIPES; "none" packs nothing
WEIGHTS = ("auto", "none", "file", "int4", "int8", "bf16", "f16", "f32")


def add_model(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add --model, --adapter (several of them) and what `add_device` adds."""
    add_name(parser)
    add_adapters(parser) if several else add_adapter(parser)
    add_device(parser)


def add_adapter(parser: argparse.ArgumentParser, use: str = "") -> None:
    """Add --adapter; `use` says what it is for, where that is not to answer."""
    help = "a LoRA adapter for the model: a file of mllama.save_lora, or a PEFT folder"
    parser.add_argument("--adapter", metavar="PATH", help=f"{help}; {use}" if use else help)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add --adapter, which may be given several times with names."""
    parser.add_argument(
        "--adapter",
        metavar="[NAME=]PATH",
        action=_Adapters,
        help="a LoRA adapter for the model: a file of mllama.save_lora, or a PEFT folder; several "
        "with names, of which the first is used until /adapter NAME",
    )


class _Adapters(argparse.Action):
    """One path, or paths by name."""

    def __call__(self, parser, namespace, values, option_string=None):
        name, equals, path = str(values).partition("=")
        before = getattr(namespace, self.dest)
        if before is None and (not equals or os.path.exists(values)):
            setattr(namespace, self.dest, values)
            return
        if not equals or not name or not path or isinstance(before, str) or name in (before or {}):
            raise argparse.ArgumentError(
                self, f"several adapters need different names, as NAME=PATH, got {values!r}"
            )
        setattr(namespace, self.dest, {**(before or {}), name: path})


def add_name(parser) -> None:
    """Add --model."""
    help = "a model folder, a GGUF file or a model id on the hub (default: the embedded model)"
    parser.add_argument("--model-id", "--model", dest="model", metavar="MODEL", help=help)


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add a command's model, in files."""
    what = (
        "a folder of Hugging Face's or Meta's files, a GGUF file or a model id on the hub "
        "(default: the embedded model)"
    )
    add_placed(parser, "folder", "MODEL", what, required=False)


def add_device(parser: argparse.ArgumentParser):
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
    add_count(
        parser,
        "--gpu-layers",
        "for a model that does not fit the GPU: keep the weights of the decoder's first N "
        "layers there, the others' in the host's memory, from where every pass copies them",
        least=0,
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
    add_reference(
        parser, "meta: Llama-3.2-Vision as trained (default); hf: as transformers computes it"
    )
    return device


def add_reference(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --reference; `what` describes it."""
    parser.add_argument("--reference", choices=("meta", "hf"), help=what)


def add_answering(parser: argparse.ArgumentParser, json: str) -> None:
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
    add_count(parser, "--max-new-tokens", "maximum length of the answer in tokens (default: 128)")
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
