"""What every section of a configuration has in common; the sections themselves stand beside the code they configure.

A section is frozen, takes keywords only, refuses keys that it does not know, and says what each value may be.
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from weightstream.units import parse_bytes


class Section(BaseModel):
    """Base of all sections: `extra="forbid"` is what turns a misspelt key into an error instead of a silent default."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""A quantity of bytes as people write it: `"512MiB"`, `"4 GB"` or an integer."""
