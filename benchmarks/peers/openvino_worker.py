"""OpenVINO GenAI's LLMPipeline on the CPU: `model` is a GGUF file."""

import time
from argparse import Namespace

import numpy as np
import openvino as ov
import openvino_genai
from serve import serve


class OpenVino:
    def __init__(self, arguments: Namespace):
        self.random = np.random.default_rng(0)
        options = {"INFERENCE_NUM_THREADS": arguments.threads}
        self.pipeline = openvino_genai.LLMPipeline(str(arguments.model), "CPU", **options)

    def decode(self, prompt: int, tokens: int) -> dict:
        made = self._run(prompt, tokens + 1)
        return {"seconds": made.perf_metrics.get_tpot().mean / 1e3 * tokens, "tokens": tokens}

    def prefill(self, tokens: int) -> dict:
        made = self._run(tokens, 1)
        return {"seconds": made.perf_metrics.get_ttft().mean / 1e3, "tokens": tokens}

    def answer(self, prompt: int, tokens: int) -> dict:
        start = time.perf_counter()
        self._run(prompt, tokens)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def _run(self, prompt: int, tokens: int):
        ids = ov.Tensor(self.random.integers(1000, 40000, (1, prompt)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        return self.pipeline.generate(ids, config)


def load(arguments: Namespace) -> tuple[dict, dict]:
    engine = OpenVino(arguments)
    actions = {name: getattr(engine, name) for name in ("decode", "prefill", "answer")}
    return {"version": openvino_genai.__version__}, actions


if __name__ == "__main__":
    serve(load)
