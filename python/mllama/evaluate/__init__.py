"""Evaluation of a model on rows with reference answers."""
