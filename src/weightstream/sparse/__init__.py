"""Weights of which only some are there: where they are, and products with nothing but them."""
