"""Text to tokens: documents, a tokenizer, memory-mapped token files, and an order that is a function of the step."""
