"""Threads that share a model take turns in what changes its adapters."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = threading.Lock()
# By model, the contexts that are open: whose, and whether it changed which adapter is in use.
_OPEN: WeakKeyDictionary[nn.Module, list[tuple[int, bool]]] = WeakKeyDictionary()


@contextmanager
def turn(model: nn.Module, changes: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Context manager: this thread relies on the adapter that the model has in use, and changes it
    if `changes` says so, which the context gives. Which one it is belongs to the model, not to a
    thread.

    Raises:
        RuntimeError: another thread relies on it meanwhile, and one of the two changes it.
    """
    thread = threading.get_ident()
    with _LOCK:
        contexts, changed = _OPEN.setdefault(model, []), changes()
        if any(other != thread and (changed or its) for other, its in contexts):
            raise RuntimeError(
                "another thread uses this model with another adapter: threads take turns "
                "(threading.Lock), or each has a copy of the model (copy.deepcopy)"
            )
        contexts.append((thread, changed))
    try:
        yield changed
    finally:
        with _LOCK:
            contexts.remove((thread, changed))
