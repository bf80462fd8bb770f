"""Show the features of a SigLIP encoder: `python examples/vision_inference.py IMAGE --model DIR`.

Prints the features' shape and a map of the cosine similarity between every patch and the center
patch: darker is more similar. DIR is a SigLIP or a model with one. Default: the embedded
model.
"""

import argparse
from pathlib import Path

import torch

import mllama
from mllama.processing.image import load_image

IMAGE = Path(__file__).parent / "pictures" / "drawn.png"
SHADES = " .:-=+*#%@"


def main(arguments: list[str] | None = None) -> None:
    """Print the shape and the map."""
    parser = argparse.ArgumentParser(description="Show the features of a SigLIP encoder.")
    parser.add_argument("image", nargs="?", default=IMAGE)
    parser.add_argument("--model", help="a folder with a SigLIP (default: the embedded model)")
    options = parser.parse_args(arguments)
    model, processor = mllama.load(options.model)
    image_processor = getattr(processor, "image_processor", processor)
    inputs = image_processor(load_image(options.image), return_tensors="pt")
    with torch.no_grad():
        output = model.vision_tower(inputs["pixel_values"].to(model.device))
    features = output.last_hidden_state.float()  # [1, patches, hidden]
    side = round(features.shape[1] ** 0.5)
    print(f"{features.shape[1]} patches, {side} x {side}, of {features.shape[2]} features each")
    center = features[0, side // 2 * side + side // 2]
    similarity = torch.cosine_similarity(features[0], center, dim=-1).clamp(0, 1).view(side, side)
    for row in (similarity * (len(SHADES) - 1)).round().int().tolist():
        print("".join(SHADES[shade] * 2 for shade in row))


if __name__ == "__main__":
    main()
