"""Tiny models do not pay for threads."""

from helpers import one_thread  # noqa: F401
