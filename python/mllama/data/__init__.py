"""Rows of training data, and batches of them. Nothing is imported until it is used."""
