"""`weightstream fit` on one rank, as one rank of several, and as the launcher of all of them; each gives the exit code."""

import gc
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from weightstream.config.config import RunConfig
from weightstream.errors import ConfigError
from weightstream.launch.board import Board
from weightstream.launch.launcher import Launch, Launcher
from weightstream.launch.ranks import Place, as_rank, joined
from weightstream.store.glance import committed_step, glance
from weightstream.system.hosts import cores, own_address, require_free_port
from weightstream.trace.compare import Comparison, compared
from weightstream.trace.files import read_trace
from weightstream.trace.perfetto import export
from weightstream.units import json_text


def fit_alone(config: RunConfig, console: Console, again: str, *, as_json: bool) -> int:
    """One rank, this process."""
    from weightstream.commands.run import fit, predicted_spans

    _set_imports_aside()
    report = fit(config, console, predict=predicted_spans)
    assert report is not None
    return _reported(report, console, again, as_json=as_json)


def fit_as_rank(place: Place, read: Callable[[], RunConfig], launched: Path | None, *, as_json: bool) -> int:
    """One of several ranks; the first one speaks."""
    board = None if launched is None else Board(launched)

    def work() -> int:
        from weightstream.commands.run import fit, predicted_spans

        _set_imports_aside()
        with joined(place, read, board) as (ranks, config):
            console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not ranks.speaks)
            report = fit(config, console, ranks, predicted_spans)
            if report is not None and board is not None:
                report["losses"] = [asdict(loss) for loss in board.losses()]
            again = shlex.join(sys.argv[1:]) if board is None else None
            code = 0 if report is None else _reported(report, console, again, as_json=as_json)
            codes: list[int] = ranks.gather(code)
            return codes[0]

    return as_rank(place, board, work)


def _set_imports_aside() -> None:
    """Modules are never garbage: collections, of which every engine does one, need not look through them each time.

    Once in a process, and not where somebody else has done it: what is garbage already would stay.
    """
    if gc.get_freeze_count():
        return
    import transformers.modeling_utils  # brings along most of what a model will import  # noqa: F401

    gc.freeze()


def launch(config: RunConfig, arguments: Sequence[str]) -> int:
    """Starts the ranks on this host, and starts them anew when one is lost."""
    cluster, roles = config.cluster, config.cluster.roles
    roles.check(config.training.most_micro_batches, config.engine.reduction_groups)
    address = own_address(cluster.address)
    require_free_port(address, cluster.port)
    found = glance(config.store)
    threads = config.engine.threads_per_worker
    if threads is None and found is not None:
        threads = found.contract.get("numerics", {}).get("threads_per_worker")
    start = Launch(
        command=("-m", "weightstream", "fit"), arguments=tuple(arguments), ranks=roles.size, address=address,
        port=cluster.port, threads=threads or max(1, cores() // roles.size),
        store=config.store, restarts=cluster.restarts,
    )  # fmt: skip

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    code = Launcher(start, say, lambda: committed_step(config.store)).run()
    if code > 2:
        say(f"go on with: weightstream fit {shlex.join(arguments)}")
    return code


def export_trace(run: Path, out: Path) -> dict[str, Any]:
    """Write a run's traced steps for Perfetto.

    Raises:
        ConfigError: the run has no trace.
    """
    trace = read_trace(run)
    if not trace.spans:
        raise _untraced(run)
    export(out, trace.spans, trace.predicted)
    steps = sorted({span.step for span in trace.spans})
    return {"trace": str(out), "steps": steps, "ranks": len({span.rank for span in trace.spans})}


def trace_comparison(run: Path) -> Comparison:
    """Predicted against measured, of a run.

    Raises:
        ConfigError: the run has no trace.
    """
    found = compared(read_trace(run))
    if found is None:
        raise _untraced(run)
    return found


def _untraced(run: Path) -> ConfigError:
    return ConfigError(
        f"run {run} has no trace: expected {run / 'trace' / 'rank-0.jsonl'}, which `weightstream fit` writes at its "
        f"third step; train on for some steps"
    )


def _reported(report: dict[str, Any], console: Console, again: str | None, *, as_json: bool) -> int:
    from weightstream.commands.outcome import summary

    print(json_text(report) if as_json else summary(report), flush=True)
    if not report["stopped_by"]:
        return 0
    hint = "" if again is None else f"; go on with: weightstream {again}"  # our launcher says it itself
    console.print(f"stopped at step {report['step']}{hint}", markup=False)
    return 128 + signal.Signals[report["stopped_by"]].value
