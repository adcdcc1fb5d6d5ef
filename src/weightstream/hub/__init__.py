"""Hugging Face both ways: weights into a new store, and out of a store into a folder that `from_pretrained` loads.

Either way one tensor is in memory at a time, in the store's record buffer; the model never exists as a whole.
"""

from weightstream.hub.exporting import export_store
from weightstream.hub.importing import import_directory, import_model, initial_values, load_gguf
from weightstream.hub.pretrained import builder, stored_config

__all__ = [
    "builder",
    "export_store",
    "import_directory",
    "import_model",
    "initial_values",
    "load_gguf",
    "stored_config",
]
