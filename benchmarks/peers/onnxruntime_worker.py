"""ONNX Runtime GenAI on the CPU: `model` is a folder of its model builder."""

import json
import time
from argparse import Namespace

import numpy as np
import onnxruntime_genai as og
from serve import serve


class OnnxRuntime:
    def __init__(self, arguments: Namespace):
        self.random = np.random.default_rng(0)
        config = og.Config(str(arguments.model))
        threads = {"session_options": {"intra_op_num_threads": arguments.threads}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self.model = og.Model(config)

    def decode(self, prompt: int, tokens: int) -> dict:
        return self.batch(prompt, tokens, 1)

    def batch(self, prompt: int, tokens: int, rows: int) -> dict:
        generator = self._prompt(rows, prompt, tokens + 1)
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return {"seconds": time.perf_counter() - start, "tokens": tokens * rows}

    def prefill(self, tokens: int) -> dict:
        start = time.perf_counter()
        self._prompt(1, tokens, 1).generate_next_token()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def answer(self, prompt: int, tokens: int) -> dict:
        start = time.perf_counter()
        generator = self._prompt(1, prompt, tokens)
        for _ in range(tokens):
            generator.generate_next_token()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def _prompt(self, rows: int, length: int, tokens: int) -> og.Generator:
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            batch_size=rows, do_sample=False, min_length=length + tokens, max_length=length + tokens
        )
        generator = og.Generator(self.model, params)
        generator.append_tokens(self.random.integers(1000, 40000, (rows, length), dtype=np.int32))
        return generator


def load(arguments: Namespace) -> tuple[dict, dict]:
    engine = OnnxRuntime(arguments)
    actions = {name: getattr(engine, name) for name in ("decode", "batch", "prefill", "answer")}
    return {"version": og.__version__}, actions


if __name__ == "__main__":
    serve(load)
