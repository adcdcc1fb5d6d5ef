"""The training loop over an engine: batches in order, validation, progress, metrics, stopping and going on."""
