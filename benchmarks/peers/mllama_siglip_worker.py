"""mllama's SigLIP: `model` is a folder, `weights` a format of `mllama.optimize`."""

from argparse import Namespace
from importlib.metadata import version

import torch
from serve import serve
from siglip import encoding

from mllama import SiglipModel
from mllama.device import choose_dtype


def load(arguments: Namespace) -> tuple[dict, dict]:
    torch.set_num_threads(arguments.threads)
    plain = arguments.weights == "f32"
    dtype = torch.float32 if plain else choose_dtype(torch.device("cpu"), 1 << 30)
    model = SiglipModel.from_pretrained(arguments.model, dtype=dtype, weights=arguments.weights)
    return {"version": version("mllama")}, {"encode": encoding(model, dtype)}


if __name__ == "__main__":
    serve(load)
