"""Packed models: weights in fewer bits, in the order in which decoding reads them."""
