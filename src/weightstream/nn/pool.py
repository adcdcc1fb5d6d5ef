"""A limit on how many experts may come to exist, and what happens when it is reached."""

from dataclasses import dataclass
from typing import Literal

from weightstream.errors import ConfigError
from weightstream.units import parse_bytes

WhenFull = Literal["refuse", "existing"]


@dataclass(frozen=True, slots=True)
class Pool:
    """So many experts may come to exist, or as many as these bytes of records hold.

    Args:
        limit: a number of experts; or bytes as text, such as "20GiB", of their records (dead bytes come on top).
        when_full: "refuse": a step that could exceed the limit is refused, before anything is changed. "existing": from the
            first such step on no expert comes to exist any more, and tokens whose expert does not exist go to the next one
            that does, by number.

    Raises:
        ConfigError: a limit that is none.
    """

    limit: int | str
    when_full: WhenFull = "refuse"

    def __post_init__(self) -> None:
        if self.when_full not in ("refuse", "existing"):
            raise ConfigError(f"Pool: when_full must be 'refuse' or 'existing', found {self.when_full!r}")
        try:
            found = self.limit if isinstance(self.limit, int) else parse_bytes(self.limit)
        except ValueError as error:
            raise ConfigError(f"Pool: expected a number of experts, or bytes as text: {error}") from None
        if found < 1:
            raise ConfigError(f"Pool: expected a limit of at least 1, found {self.limit!r}")

    @property
    def counts(self) -> bool:
        """Whether experts are counted, and not their bytes."""
        return isinstance(self.limit, int)

    @property
    def most(self) -> int:
        """The limit, in experts or bytes."""
        return self.limit if isinstance(self.limit, int) else parse_bytes(self.limit)
