"""Every error a user can cause or meet, by what it is about.

Each message names the object, what was expected, what was found and what to do. All of them end a command with exit
code 2 and one screen of text; none of them leaves anything changed on disk.
"""

import difflib
from collections.abc import Sequence


class WeightstreamError(Exception):
    """Base of all errors that weightstream raises on purpose."""


class ConfigError(WeightstreamError):
    """A configuration that cannot be read: unknown key, wrong type, impossible value."""


class PlanError(WeightstreamError):
    """A run that cannot work within its budgets; the message names the smallest change that would."""


class AuditError(WeightstreamError):
    """A model that would train silently wrong if it were streamed."""


class StoreError(WeightstreamError):
    """A store that cannot be created, opened or read."""


class PlaceTakenError(StoreError):
    """A new store is to be made where there is something already, which stays as it is."""


class StoreInUseError(StoreError):
    """Another process holds the store open for writing."""


class StoreMismatchError(StoreError):
    """A store that holds another model, or was written under settings that may not change."""


class DamagedRecordError(StoreError):
    """Bytes on disk differ from the checksum under which they were committed."""


class DataError(WeightstreamError):
    """Text or tokens that cannot be used: missing, empty, beyond the vocabulary."""


class NonFiniteError(WeightstreamError):
    """Too many steps in a row had a gradient that is not finite."""


class RefusedError(WeightstreamError):
    """What one rank refuses, all ranks refuse, with the same message."""


class FabricError(ConnectionError):
    """Ranks that cannot go on together: one is gone, silent, or does something else. The last commit is whole.

    Nothing that a person has to put right: the same command goes on, and so it ends one with another exit code than 2.
    """


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about a name that is unknown: the nearest of those that are known, if one is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
