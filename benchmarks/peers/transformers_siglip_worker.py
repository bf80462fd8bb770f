"""transformers' SigLIP: `model` is a folder, `weights` is "f32" or "bf16"."""

from argparse import Namespace

import torch
import transformers
from serve import serve
from siglip import encoding
from transformers_worker import DTYPES


def load(arguments: Namespace) -> tuple[dict, dict]:
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.weights]
    model = transformers.SiglipVisionModel.from_pretrained(arguments.model, dtype=dtype).eval()
    version = f"{transformers.__version__}, torch {torch.__version__}"
    return {"version": version}, {"encode": encoding(model, dtype)}


if __name__ == "__main__":
    serve(load)
