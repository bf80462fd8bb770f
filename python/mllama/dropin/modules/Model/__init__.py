from Model.model import MLLAMAConfig, MllamaForConditionalGeneration  # noqa: F401
