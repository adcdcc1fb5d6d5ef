"""One process among the ranks: what torchrun told it, how it meets the others, and how it says that it ends."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar

from weightstream import __version__
from weightstream.cluster import Cluster
from weightstream.errors import ConfigError, RefusedError, WeightstreamError
from weightstream.fabric.agreement import gather, meanwhile, together
from weightstream.launch.board import Board, Ending
from weightstream.system.hosts import own_address
from weightstream.system.processes import end_with_parent
from weightstream.training.stopping import Stop, StopElsewhere, StopRequest

if TYPE_CHECKING:
    from weightstream.config.config import RunConfig
    from weightstream.fabric.links import Links

T = TypeVar("T")
_OF_ITS_HOST = ("out", "cluster.address", "cluster.port")
"""Keys that may differ from rank to rank: hosts differ in them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place among the ranks; `local` ones are those of its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place() -> Place | None:
    """What torchrun says in the environment; None outside of it."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if told[0] is None or told[1] is None:
        return None
    return Place(int(told[0]), int(told[1]), int(told[2] or 0), int(told[3] or 1))


class RunRanks:
    """All processes of a run as one of them sees them. Without links it is alone, and everything here is a plain call."""

    def __init__(
        self, place: Place, cluster: Cluster, links: "Links | None" = None, board: Board | None = None
    ) -> None:
        self.place, self.cluster, self.links, self.board = place, cluster, links, board

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that a person hears."""
        return self.place.rank == 0

    @property
    def owns(self) -> bool:
        """Whether this rank has a part of the store."""
        return self.rank in self.cluster.memory_ranks

    def stop(self, tell: Callable[[str], None]) -> Stop:
        """How this rank learns that a person asked for a stop: by a signal, or the first one from our launcher's board.

        Under that launcher SIGTERM means what it means by default: another rank was lost.
        """
        if self.board is None:
            return StopRequest(tell)
        if self.speaks:
            return StopElsewhere(self.board.stop_asked, self.board.say_training, tell)
        return StopElsewhere(lambda: None, lambda: None, tell)

    def stepped(self, step: int, say: Callable[[str], None]) -> None:
        """A step is done: after a loss everybody may know what it cost."""
        if self.board is not None and self.speaks and (loss := self.board.say_trains_again(step)):
            say(f"training again at step {step}, {loss.seconds:.1f} s after {loss.cause}")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small JSON value, in order of rank: a collective.

        Raises:
            RefusedError: a rank has refused meanwhile.
        """
        return [value] if self.links is None else gather(self.links, value)

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every rank, and go on if nobody refuses; else all raise the same `RefusedError`."""
        return work() if self.links is None else together(self.links, work)

    def first(self, work: Callable[[], T]) -> T | None:
        """Do something on one rank of each host while the others wait, however long it takes; they get None.

        It runs in a thread, while the ranks assure each other that they are there.
        """
        if self.links is None:
            return work()
        return self.together(meanwhile(self.gather, work if self.place.local_rank == 0 else None))


ALONE = RunRanks(Place(), Cluster())


@contextmanager
def joined(
    place: Place, read: "Callable[[], RunConfig]", board: Board | None
) -> "Iterator[tuple[RunRanks, RunConfig]]":
    """Read the configuration on every rank, meet the others, and see that all have the same.

    Raises:
        RefusedError: a rank cannot read it, has another one, or another version of this package; or torchrun started
            another number of ranks than it asks for. On all ranks, with one message.
        RefusedError: ranks on several hosts would listen on loopback.
        ConfigError: this host lacks the address on which it should listen.
    """
    # torch and pydantic are imported with them, and with the modules above they are not.
    from weightstream.config.config import RunConfig
    from weightstream.fabric.distributed import connect

    config, problem = None, None
    try:
        config = read()
    except (WeightstreamError, OSError) as error:
        problem = error
    settings = RunConfig.model_fields["cluster"].default if config is None else config.cluster
    address = own_address(settings.address)
    if place.local_size < place.size and ip_address(address).is_loopback:
        raise RefusedError(
            f"cluster.address={settings.address} is reached from its own host only, and torchrun started {place.size} ranks, "
            f"{place.local_size} of them on {socket.gethostname()}; give cluster.address=NAME of the network interface that "
            "the hosts share (see the page on trust first)"
        )
    links = connect(timeout_s=settings.timeout_s, address=address)
    try:

        def own() -> RunConfig:
            if config is None:
                assert problem is not None
                raise problem
            _check_size(config, place)
            return config

        agreed = together(links, own)
        _check_same(links, agreed)
        yield RunRanks(place, agreed.cluster.roles, links, board), agreed
    except RefusedError:  # all ranks have it
        raise
    except Exception as error:
        links.stop(str(error))
        raise
    finally:
        links.close()


def _check_size(config: "RunConfig", place: Place) -> None:
    cluster = config.cluster
    if cluster.roles.size != place.size:
        raise ConfigError(
            f"cluster.workers={cluster.workers} with cluster.memory={cluster.memory} are {cluster.roles.size} ranks, "
            f"torchrun started {place.size}; make both the same"
        )
    cluster.roles.check(config.training.most_micro_batches, config.engine.reduction_groups)


def _check_same(links: "Links", config: "RunConfig") -> None:
    """Refuse ranks whose configuration or package differs from rank 0's, naming what differs."""
    import torch

    own = {
        "weightstream": __version__,
        "torch": str(torch.__version__),
        **{key: value for key, value in _flat(config.model_dump(mode="json")) if key not in _OF_ITS_HOST},
    }
    told = gather(links, {"host": socket.gethostname(), "has": own})
    for rank, other in enumerate(told):
        different = [
            key for key in {**told[0]["has"], **other["has"]} if told[0]["has"].get(key) != other["has"].get(key)
        ]
        if different:
            key = different[0]
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            kind = "version" if key in ("weightstream", "torch") else "configuration"
            raise RefusedError(
                f"ranks differ in {key}{more}: rank {rank} on {other['host']} has {other['has'].get(key)!r}, rank 0 on "
                f"{told[0]['host']} has {told[0]['has'].get(key)!r}; give all ranks the same {kind}"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def as_rank(place: Place, board: Board | None, work: Callable[[], int]) -> int:
    """Do a rank's work to its end and say how it ended: on the board, else on stderr; the process's exit code.

    `work` returns the command's exit code. What all ranks refuse, rank 0 says; what one refuses, that one. Under our own
    launcher the launcher does.
    """
    # Under another launcher the parent may have ended before this line; then nobody can tell, and the rendezvous fails.
    end_with_parent(os.getppid() if board is None else board.agent())
    message, everywhere = "", False
    try:
        code = work()
    except RefusedError as error:
        code, message, everywhere = 2, str(error), True
    except (WeightstreamError, OSError) as error:
        # A connection that broke is a rank that was lost; what else the system refuses is a person's to put right.
        lost = isinstance(error, ConnectionError | TimeoutError)
        code, message = 1 if lost else 2, str(error)
    except Exception as error:
        traceback.print_exc()
        code, message = 1, f"{type(error).__name__}: {error}"
    if board is not None:
        board.say_ended(place.rank, Ending(code, message, everywhere))
        return 0 if code > 2 else code  # a stop is no failure, of which the agent would make one
    if message and (not everywhere or place.rank == 0):
        print(
            f"weightstream: {message if everywhere else f'rank {place.rank}: {message}'}", file=sys.stderr, flush=True
        )
    return code
