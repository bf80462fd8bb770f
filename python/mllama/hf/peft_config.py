"""Where PEFT says that it has put adapters into a model."""

from typing import Any


class PeftConfigMixin:
    """A model that notices PEFT's adapters: PEFT sets the attribute `peft_config` of the model when
    its layers are in place, and deletes it when they are removed.
    """

    @property
    def peft_config(self) -> Any:
        """PEFT's configs by adapter; there is no such attribute before PEFT has set it."""
        try:
            return self.__dict__["_peft_config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute 'peft_config'") from None

    @peft_config.setter
    def peft_config(self, configs: Any) -> None:
        from mllama.hf.peft_layers import adopt

        self.__dict__["_peft_config"] = configs
        adopt(self)  # type: ignore[arg-type]

    @property
    def has_peft_layers(self) -> bool:
        """Whether layers of PEFT's are in place. PEFT before 0.19 leaves the attribute behind."""
        if "_peft_config" not in self.__dict__:
            return False
        from peft.tuners.tuners_utils import BaseTunerLayer

        return any(isinstance(module, BaseTunerLayer) for module in self.modules())  # type: ignore

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)
