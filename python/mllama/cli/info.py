"""`mllama info`: what to include in a bug report."""

import argparse
import json
import math
import platform
from importlib import metadata

import torch
from safetensors import safe_open

from mllama import __version__, _ext
from mllama.assets import EMBEDDED
from mllama.device import cpu_features


def run(arguments: argparse.Namespace) -> None:
    """Print installed versions and the machine's capabilities."""
    found = collect()
    if arguments.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name + ':':18}{', '.join(map(str, value)) if isinstance(value, list) else value}")


def collect() -> dict[str, str | int | list[str]]:
    """Names and values in the order they are printed. A kernel module that cannot be loaded is
    reported, not raised.
    """
    return {
        "mllama": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "platform": platform.platform(),
        "cpu": cpu_features(),
        "threads": torch.get_num_threads(),
        **_kernels(),
        "cuda": _cuda(),
        "embedded model": _embedded(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str | list[str]]:
    try:
        module = _ext.load()
    except (ImportError, ValueError) as error:
        return {"kernels": f"not available: {error}"}
    if module is None:
        return {"kernels": "disabled by MLLAMA_DISABLE_OPS=1"}
    built = module.build_info()
    return {
        "kernels": built["operators"].split(),
        "instruction set": (
            f"{module.isa()} (of {built['instruction_sets']}; best here {module.best_isa()})"
        ),
        "built with": (
            f"torch {built['torch']}, {built['compiler']}, "
            f"{'CUDA ' + built['cuda_toolkit'] if built['cuda_toolkit'] else 'no CUDA toolkit'}"
        ),
    }


def _cuda() -> str:
    if not torch.cuda.is_available():
        return (
            "not available"
            if torch.version.cuda is None
            else f"{torch.version.cuda} in torch, no device"
        )
    return f"{torch.version.cuda}, " + ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )


def _embedded() -> str:
    weights = EMBEDDED / "model.safetensors"
    if not weights.is_file():
        return f"not in {EMBEDDED}"
    with safe_open(weights, framework="numpy") as file:
        names = file.keys()
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    size = weights.stat().st_size
    return f"{parameters / 1e6:.1f} million parameters, {size / 1e6:.1f} MB, {EMBEDDED}"
