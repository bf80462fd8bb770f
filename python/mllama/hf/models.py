"""The transformers class of a model."""

from typing import Any

from transformers import PreTrainedModel

from mllama.checkpoints.loading import Report
from mllama.checkpoints.models import survey
from mllama.checkpoints.opened import Opened
from mllama.config.spec import ModelSpec
from mllama.hf.config_objects import config_object
from mllama.hf.modeling import MllamaForConditionalGeneration
from mllama.hf.siglip import SiglipModel
from mllama.quant.loading import lay_out_packed


def model_class(spec: ModelSpec) -> type[Any]:
    """The class for a spec: SiglipModel for a SigLIP vision model alone."""
    return SiglipModel if spec.text is None else MllamaForConditionalGeneration


def survey_opened(opened: Opened) -> tuple[PreTrainedModel, Report]:
    """The model of opened files on the meta device, and the report of matching it with them."""
    config = config_object(opened.config)

    def build(spec: ModelSpec) -> PreTrainedModel:
        model = model_class(spec)(config)
        if opened.packing is not None:
            lay_out_packed(model, opened.source)
        return model

    return survey(opened, build)
