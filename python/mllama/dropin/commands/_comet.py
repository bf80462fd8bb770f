"""What `inference.py` tells Comet, where Comet is installed and set up; otherwise nothing is sent
and nothing is said.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_VARIABLES = ("COMET_API_KEY", "COMET_PROJECT_NAME", "COMET_WORKSPACE")
_FILE = ".comet.config"


def start_experiment() -> "Experiment | None":
    """An experiment in Comet, or None: without comet_ml, and without its three variables or a
    .comet.config here or at home.
    """
    chosen = all(map(os.environ.get, _VARIABLES)) or any(
        (folder / _FILE).is_file() for folder in (Path(), Path.home())
    )
    if not chosen:
        return None
    try:
        import comet_ml
    except ImportError:
        return None
    return Experiment(comet_ml.Experiment())  # which reads the variables or the file


class Experiment:
    """One run of `inference.py` in Comet."""

    def __init__(self, comet):
        self._comet = comet

    def log(
        self,
        options: Mapping[str, Any],
        inputs: Mapping[str, torch.Tensor],
        output,
        picture,
        answer: str,
    ) -> None:
        """Log a run and end the experiment.

        Args:
            options: generate's.
            inputs: the model's: input_ids, attention_mask, pixel_values and so on.
            output: what `generate` returned, with logits: one [1, vocabulary] for each new token.
            picture: a PIL picture, or None.
            answer: the decoded text.
        """
        self._comet.log_parameters(dict(options))
        for name, values in inputs.items():
            self._values(name, values)
        self._values("logits", torch.cat(output.logits))
        self._values("encoded tokens", output.sequences[:, inputs["input_ids"].shape[1] :])
        self._comet.log_text(answer, metadata={"name": "decoded tokens"})
        if picture is not None:
            self._comet.log_image(picture, name="picture")
        self._comet.end()

    def _values(self, name: str, values: torch.Tensor) -> None:
        """Whole numbers as text, others as a histogram."""
        if values.is_floating_point():
            self._comet.log_histogram_3d(values.float().cpu().numpy(), name=name)
        else:
            self._comet.log_text(str(values.tolist()), metadata={"name": name})
