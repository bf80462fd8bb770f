"""The states of all random number generators of a process, as tensors."""

import random
import struct

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all generators."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def capture() -> dict[str, torch.Tensor]:
    """States of torch's, CUDA's, Python's and numpy's global generators, of this process."""
    version, words, spare = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_spare": _bits(spare),
    }
    state = np.random.get_state(legacy=False)
    if state["bit_generator"] == "MT19937":
        found["numpy"] = torch.tensor([state["state"]["pos"], *state["state"]["key"].tolist()])
        found["numpy_spare"] = _bits(state["gauss"] if state["has_gauss"] else None)
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(states: dict[str, torch.Tensor]) -> None:
    """Put the generators into the states that `capture` returned."""
    states = {name: state.clone() for name, state in states.items()}  # torch reads from the storage
    torch.set_rng_state(states["torch"])
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), _number(states["python_spare"])))
    if "numpy" in states:
        position, *key = states["numpy"].tolist()
        spare = _number(states["numpy_spare"])
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
                "has_gauss": int(spare is not None),
                "gauss": spare or 0.0,
            }
        )
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _bits(number: float | None) -> torch.Tensor:
    """The second of a pair of normal numbers, if one is left, as int64 [1 + its 8 bytes]."""
    return torch.tensor([number is not None, *struct.pack("<d", number or 0.0)])


def _number(bits: torch.Tensor) -> float | None:
    there, *data = bits.tolist()
    return struct.unpack("<d", bytes(data))[0] if there else None
