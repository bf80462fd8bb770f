"""Evaluation of a model on rows with reference answers."""

from mllama.evaluate.metrics import METRICS, score
from mllama.evaluate.report import write_report
from mllama.evaluate.run import Evaluation, run

__all__ = ["METRICS", "Evaluation", "run", "score", "write_report"]
