"""The engines that are compared, and where this machine has them."""

import os
import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """A name for tables, and what runs benchmarks/peers/<worker>_worker.py.

    Attributes:
        variable: environment variable with the path of a Python that has the engine. None: it runs
            on this one.
    """

    name: str
    worker: str
    variable: str | None = None

    @property
    def python(self) -> str | None:
        """The interpreter; None where the engine is not installed."""
        if self.worker == "llama_bench":
            os.environ.setdefault("LLAMA_BENCH", shutil.which("llama-bench") or "")
            return sys.executable if os.environ["LLAMA_BENCH"] else None
        if self.variable is None:
            return sys.executable
        return os.environ.get(self.variable) or None


MLLAMA = Engine("mllama", "mllama")
LLAMA_BENCH = Engine("llama.cpp", "llama_bench")
LLAMA_CPP = Engine("llama.cpp", "llama_cpp", "PEER_LLAMA_CPP")
OPENVINO = Engine("OpenVINO", "openvino", "PEER_OPENVINO")
ONNXRUNTIME = Engine("ONNX Runtime", "onnxruntime", "PEER_ONNXRUNTIME")
MISTRALRS = Engine("mistral.rs", "mistralrs", "PEER_MISTRALRS")
TRANSFORMERS = Engine("transformers", "transformers")
MLLAMA_SIGLIP = Engine("mllama", "mllama_siglip")
ONNXRUNTIME_SIGLIP = Engine("ONNX Runtime", "onnxruntime_siglip", "PEER_ONNXRUNTIME")
TRANSFORMERS_SIGLIP = Engine("transformers", "transformers_siglip")
TORCH = Engine("torch products", "torch")
