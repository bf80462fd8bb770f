"""Which trained parameters the data reaches: a model adapted in its encoder alone gets no gradient
from a text.
"""

import torch

from mllama.lora.scopes import is_read
from mllama.train.prepare import adapter_parameters
from mllama.train.setup import Setup


class Unreached:
    """The trained parameters that no gradient has reached.

    Attributes:
        names: of these parameters, as this process knows them.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self.names = set(setup.parameters)

    def note(self) -> None:
        """Forget those that have a gradient now."""
        if self.names:
            found = self._setup.parameters
            self.names = {name for name in self.names if found[name].grad is None}

    def share(self) -> None:
        """Forget those that another process has reached; every process calls this."""
        names, accelerator = list(self._setup.parameters), self._setup.accelerator
        own = torch.tensor([name in self.names for name in names], dtype=torch.int64)
        counts = accelerator.reduce(own.to(self._setup.device), "sum").tolist()
        everywhere = accelerator.num_processes
        self.names = {name for name, n in zip(names, counts, strict=True) if n == everywhere}

    def check(self, step: int) -> None:
        """Raise ValueError if an adapter is not reached. Parts of modules trained in full may be
        unused, and those of adapters that were given: LLaVA reads the features of an earlier layer
        than its encoder's last.
        """
        model, parameters = self._setup.model, self._setup.parameters
        adapters = set(map(id, adapter_parameters(model)))
        missing = sorted(
            name for name in self.names if id(parameters[name]) in adapters and is_read(model, name)
        )
        if missing:
            shown = ", ".join(missing[:3]) + " ..." * (len(missing) > 3)
            raise ValueError(
                f"step {step}: no gradient has reached {len(missing)} parameter(s), {shown}: leave "
                "them out of targets, or give data that uses them"
            )


def check_updated(setup: Setup, step: int) -> None:
    """Raise ValueError if the scaler of a float16 run has skipped all steps up to this one. The
    optimizer has no state then. Checkpoints keep it: steps before a resume count.
    """
    if setup.scaler.is_enabled() and not setup.optimizer.state:
        raise ValueError(
            f"step {step}: all {step} steps were skipped, so nothing is trained: their float16 "
            f"gradients were not finite, and the scale of the loss is still "
            f"{setup.scaler.get_scale():g}; it halves with each such step: make more steps, or set "
            "dtype to bfloat16 or float32"
        )
