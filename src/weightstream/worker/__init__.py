"""The workers: slabs for weights, the tape, and nothing that outlives a step."""
