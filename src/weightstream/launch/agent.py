"""`python -m weightstream.launch.agent`: torchrun's launcher for the ranks of one host, started by `weightstream fit`.

It is `torch.distributed.launcher`, which `torchrun` itself calls, with three differences: the rendezvous listens on one
address only (torchrun's listens on all of them); it prints nothing, but leaves exit codes on the board; and it ends with
the launcher.
"""

import argparse
import logging
import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from weightstream.launch.board import AGENT, Board, Ending, Failure
from weightstream.system.hosts import listener
from weightstream.system.processes import end_with_parent

_RENDEZVOUS = "weightstream"
_PATIENCE = timedelta(minutes=15)


class OneHost(RendezvousHandler):
    """A rendezvous that nobody else joins, and the key-value store where the ranks find each other."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._address, port = parse_rendezvous_endpoint(parameters.endpoint, 0)
        bound = listener(self._address, port)
        self._port = bound.getsockname()[1]
        self._store = TCPStore(
            self._address, self._port, is_master=True, timeout=_PATIENCE, wait_for_workers=False,
            master_listen_fd=bound.detach(),
        )  # fmt: skip

    def get_backend(self) -> str:
        return _RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(self._address, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def main() -> int:
    """Start the ranks, wait for them, and leave their exit codes on the board."""
    parser = argparse.ArgumentParser()
    for name in ("launcher", "ranks", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--board", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("command", nargs="+")
    told = parser.parse_args()
    end_with_parent(told.launcher)
    board = Board(told.board)
    board.say_agent()
    logging.disable(logging.CRITICAL)  # what failed is said by the launcher, once
    rendezvous_handler_registry.register(_RENDEZVOUS, OneHost)
    address = f"[{told.address}]" if ":" in told.address else told.address
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=told.ranks, run_id="weightstream", rdzv_backend=_RENDEZVOUS,
        rdzv_endpoint=f"{address}:{told.port}", max_restarts=0, monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(told.board / "logs")),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(*told.command)
    except ChildFailedError as failed:
        board.say_failures({rank: Failure(seen.exitcode, seen.pid) for rank, seen in failed.failures.items()})
        return 1
    except OSError as error:
        where = f"{told.address}, port {told.port or 'any'}"
        board.say_ended(AGENT, Ending(2, f"the rendezvous cannot listen on {where}: {error.strerror}", everywhere=True))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
