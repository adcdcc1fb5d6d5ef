"""What ranks agree on before the first step: virtual ranks of one process."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightstream.cluster import Cluster
from weightstream.commands.preflight import require_memory, require_same_text, store_exists
from weightstream.config.config import RunConfig, check_config
from weightstream.errors import FabricError, RefusedError, StoreError
from weightstream.fabric.agreement import gather, together
from weightstream.fabric.links import Links
from weightstream.fabric.local import run_ranks
from weightstream.launch.ranks import ALONE, Place, RunRanks, _check_same
from weightstream.training.ranks import RankFacts, describe

SIZE = 3


def everywhere(work: Callable[[Links], Any], *, timeout_s: float = 20.0) -> list[Any]:
    """What each rank got, or the error that it raised, as text."""

    def told(links: Links) -> Any:
        try:
            return work(links)
        except (RefusedError, StoreError) as error:
            return f"{type(error).__name__}: {error}"

    return run_ranks(Cluster(SIZE), told, timeout_s=timeout_s)


def ranks(links: Links) -> RunRanks:
    return RunRanks(Place(links.rank, SIZE, links.rank, SIZE), Cluster(SIZE), links)


def config(out: Path, **changes: Any) -> RunConfig:
    return check_config({"model": {"model_type": "llama"}, "out": str(out), **changes}, source="test")


def test_what_one_refuses_all_refuse() -> None:
    def work(links: Links) -> None:
        def own() -> None:
            if links.rank == 1:
                raise StoreError("the disk is full")

        together(links, own)

    (found,) = set(everywhere(work))
    assert found.startswith("RefusedError: rank 1 on ")
    assert found.endswith(": the disk is full")


def test_what_all_refuse_is_said_without_a_rank() -> None:
    def refuse() -> None:
        raise StoreError("no store")

    assert everywhere(lambda links: together(links, refuse)) == ["RefusedError: no store"] * SIZE


def test_a_refusal_reaches_those_who_meet_for_something_else() -> None:
    def work(links: Links) -> Any:
        def own() -> list[Any]:
            if links.rank == 2:
                raise StoreError("not here")
            return [gather(links, links.rank), gather(links, "later")]

        return together(links, own)

    (found,) = set(everywhere(work))
    assert found.endswith(": not here")


def test_a_lost_rank_is_no_refusal() -> None:
    """It would end the run with exit code 2 instead of starting it anew; and nobody could be told of it."""

    def work(links: Links) -> None:
        def lose() -> None:
            raise FabricError("the other rank is gone")

        together(links, lose)

    with pytest.raises(FabricError, match="the other rank is gone"):
        everywhere(work)


def test_others_wait_for_the_first_however_long_it_takes() -> None:
    def slow() -> str:
        time.sleep(1.5)
        return "done"

    assert everywhere(lambda links: ranks(links).first(slow), timeout_s=0.8) == ["done", None, None]


def test_what_the_first_refuses_all_refuse() -> None:
    def refuse() -> None:
        raise StoreError("no text")

    assert {text.rpartition(": ")[2] for text in everywhere(lambda links: ranks(links).first(refuse))} == {"no text"}
    assert ALONE.first(lambda: 5) == 5


def test_ranks_with_other_settings_are_told_which(tmp_path: Path) -> None:
    def work(links: Links) -> None:
        changes: dict[str, Any] = {"training": {"steps": 7}} if links.rank == 2 else {}
        _check_same(links, config(tmp_path / str(links.rank), cluster={"address": f"host-{links.rank}"}, **changes))

    (found,) = set(everywhere(work))
    assert "ranks differ in training.steps: rank 2 on " in found
    assert " has 7, rank 0 on " in found


def test_a_host_without_its_part_of_the_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0" / "store").mkdir(parents=True)
    (tmp_path / "0" / "store" / "manifest.sqlite").touch()
    (tmp_path / "1" / "store").mkdir(parents=True)
    (found,) = set(everywhere(lambda links: store_exists(config(tmp_path / str(links.rank)), ranks(links))))
    assert found.startswith("RefusedError: rank 2 on ")
    assert f"no part of a store at {tmp_path / '2' / 'store'}" in found
    (tmp_path / "2" / "store").mkdir(parents=True)
    assert everywhere(lambda links: store_exists(config(tmp_path / str(links.rank)), ranks(links))) == [True] * SIZE
    assert everywhere(lambda links: store_exists(config(tmp_path / "new"), ranks(links))) == [False] * SIZE


def test_hosts_with_other_text_are_refused() -> None:
    def work(links: Links) -> None:
        dataset: Any = SimpleNamespace(digest="other" if links.rank == 1 else "same")
        require_same_text(dataset, ranks(links))

    (found,) = set(everywhere(work))
    assert "the text here has digest other, rank 0's same" in found


def test_a_plan_beyond_a_hosts_memory_is_refused_over_all_its_ranks() -> None:
    allotment = SimpleNamespace(host_bytes=3 << 30, device_bytes=1 << 30)
    engine: Any = SimpleNamespace(allotment=allotment, device=torch.device("cpu"))
    (found,) = set(everywhere(lambda links: require_memory(engine, 11 << 30, ranks(links))))
    assert "3 ranks on " in found
    assert "plan 12.0 GiB of memory together, 11.0 GiB are free" in found
    assert everywhere(lambda links: require_memory(engine, 13 << 30, ranks(links))) == [None] * SIZE
    assert everywhere(lambda links: require_memory(engine, None, ranks(links))) == [None] * SIZE
    require_memory(engine, 1, ALONE)


def test_the_line_of_the_ranks_names_the_busiest_link_and_the_slowest_rank() -> None:
    ranks = [
        RankFacts(seconds=1.0, stalled_s=0.0, sent={1: (5 << 20, 1 << 20), 2: (3 << 20, 0)}, rss_bytes=1),
        RankFacts(seconds=1.0, stalled_s=0.5, sent={0: (0, 2 << 20)}, rss_bytes=1),
        RankFacts(seconds=1.0, stalled_s=0.1, sent={}, rss_bytes=1),
    ]
    line = describe(ranks, first_computing=1)
    assert line == "3 ranks  down 8.00 MiB  up 3.00 MiB  0→1 6.00 MiB  slowest 2  waited 0.30 s", line
    assert len(line) <= 80
    assert ranks[0].sent_figures() == {
        "down_bytes": 8 << 20, "up_bytes": 1 << 20, "sent_to_1_bytes": 6 << 20, "sent_to_2_bytes": 3 << 20
    }  # fmt: skip
    assert describe([], 0) == ""
