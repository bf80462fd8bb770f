"""Benchmarks: `python -m benchmarks [operator ...]` from the repository root, where mllama is
installed.
"""
