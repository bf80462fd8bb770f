"""ONNX Runtime on the CPU: `model` is a file of export_siglip.py; `weights` is what it is."""

import time
from argparse import Namespace

import numpy as np
import onnxruntime as ort
from serve import serve


def load(arguments: Namespace) -> tuple[dict, dict]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = ort.InferenceSession(arguments.model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    (given,) = session.get_inputs()

    def encode(images: int) -> dict:
        pixels = random.standard_normal((images, *given.shape[1:]), dtype=np.float32)
        start = time.perf_counter()
        session.run(None, {given.name: pixels})
        return {"seconds": time.perf_counter() - start, "tokens": images}

    return {"version": ort.__version__}, {"encode": encode}


if __name__ == "__main__":
    serve(load)
