"""Between store and workers: weights out, gradients back and summed on the way."""
