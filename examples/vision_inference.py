"""Shows what a SigLIP tower makes of a picture: `python examples/vision_inference.py PICTURE
--model FOLDER`.

Prints the features' shape and a map of how like every patch is to the one in the middle: the
darker, the more alike. FOLDER holds a SigLIP, or a model with one; without it, the embedded model's
tower looks.
"""

import argparse
from pathlib import Path

import torch

import mllama
from mllama.processing.image import load_picture

PICTURE = Path(__file__).parent / "pictures" / "drawn.png"
SHADES = " .:-=+*#%@"


def main(arguments: list[str] | None = None) -> None:
    """Print the shape and the map."""
    parser = argparse.ArgumentParser(description="Show what a SigLIP tower makes of a picture.")
    parser.add_argument("picture", nargs="?", default=PICTURE)
    parser.add_argument(
        "--model", help="a folder with a SigLIP tower (default: the embedded model)"
    )
    asked = parser.parse_args(arguments)
    model, processor = mllama.load(asked.model)
    image_processor = getattr(processor, "image_processor", processor)
    pixel_values = image_processor(load_picture(asked.picture), return_tensors="pt")[
        "pixel_values"
    ].to(model.device)
    with torch.no_grad():
        features = model.vision_tower(
            pixel_values
        ).last_hidden_state.float()  # [1, patches, hidden]
    side = round(features.shape[1] ** 0.5)
    print(f"{features.shape[1]} patches, {side} x {side}, of {features.shape[2]} features each")
    center = features[0, side // 2 * side + side // 2]
    similarity = torch.cosine_similarity(features[0], center, dim=-1).clamp(0, 1).view(side, side)
    for row in (similarity * (len(SHADES) - 1)).round().int().tolist():
        print("".join(SHADES[shade] * 2 for shade in row))


if __name__ == "__main__":
    main()
