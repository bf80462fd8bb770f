"""Writes a SigLIP vision model for onnxruntime_siglip_worker.py, on the Python that has it: FOLDER,
OUT and "f32" or "int8", which is ONNX Runtime's dynamic quantization of the weights by channel.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import SiglipVisionModel


class Features(torch.nn.Module):
    def __init__(self, folder: str):
        super().__init__()
        self.model = SiglipVisionModel.from_pretrained(folder).eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).pooler_output


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("folder", "out", "kind"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    model = Features(arguments.folder)
    size = model.model.config.image_size
    with tempfile.TemporaryDirectory() as aside:
        dense = Path(aside) / "model.onnx"
        torch.onnx.export(
            model,
            (torch.randn(1, 3, size, size),),
            dense,
            dynamo=False,
            input_names=["pixel_values"],
            dynamic_axes={"pixel_values": {0: "images"}},
        )
        if arguments.kind == "int8":
            quantize_dynamic(dense, arguments.out, weight_type=QuantType.QInt8, per_channel=True)
        else:
            Path(arguments.out).write_bytes(dense.read_bytes())


if __name__ == "__main__":
    main()
