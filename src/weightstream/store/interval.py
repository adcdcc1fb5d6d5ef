"""How often steps are committed: every so many steps, or seconds.

Between commits the last one stays whole on disk, and the states of the steps since are in files beside it.
"""

import time

from weightstream.errors import ConfigError
from weightstream.units import parse_seconds


class Interval:
    """`every` is a number of steps, or a time such as `"30s"`, `"5min"`, `"1h"`; it is counted from the last commit.

    Raises:
        ConfigError: neither, or not positive.
    """

    def __init__(self, every: int | str = 1) -> None:
        self._steps: int | None = None
        self._seconds: float | None = None
        try:
            if isinstance(every, bool) or not isinstance(every, int | str):
                raise ValueError(f"a time such as '30s', found {every!r}")
            if isinstance(every, str) and not every.strip().isdigit():
                self._seconds = parse_seconds(every)
            else:
                self._steps = int(every)
        except ValueError as error:
            raise ConfigError(f"commit_every: expected a number of steps, or {error}") from None
        if not (self._steps or self._seconds) or (self._steps or 1) < 0:
            raise ConfigError(f"commit_every: expected at least one step, or a positive time, found {every!r}")
        self.agreed: bool | None = None
        """Whether the time has passed, where several ranks must commit the same steps: the first one's clock decides."""
        self.restart()

    def restart(self) -> None:
        """A commit was made."""
        self._since, self._count = time.monotonic(), 0

    def passed(self) -> bool:
        """Counts a step; tells whether a commit is due after it."""
        self._count += 1
        if self._steps is not None:
            return self._count >= self._steps
        return self.elapsed() if self.agreed is None else self.agreed

    def elapsed(self) -> bool:
        """Whether the time has passed, by this process's clock; never, where steps are counted."""
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds
