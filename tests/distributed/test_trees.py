"""Routes and plans as data, carried out on symbols: what arrives where, in which order it is summed, who sends what."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from weightstream.cluster import Cluster
from weightstream.fabric.trees import Hand, Join, Merge, Take, broadcast_route, reduce_plan
from weightstream.schedule.reduction import subtrees


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    workers = draw(st.integers(1, 40))
    memory = draw(st.one_of(st.just("colocated"), st.integers(1, 5)))
    return Cluster(workers, memory)


def contract(low: int, high: int) -> str:
    """The sum of groups as the numerical contract has it."""
    if high - low == 1:
        return str(low)
    middle = (low + high) // 2
    return f"({contract(low, middle)}+{contract(middle, high)})"


@given(clusters(), st.data())
def test_a_broadcast_reaches_every_compute_rank_once(cluster: Cluster, data: st.DataObject) -> None:
    owner = data.draw(st.sampled_from(cluster.memory_ranks))
    rotation = data.draw(st.integers(0, 100))
    chain_below = data.draw(st.sampled_from([1, 8, 1000]))
    routes = {rank: broadcast_route(cluster, rank, owner, rotation, chain_below) for rank in range(cluster.size)}
    assert len(routes[owner].targets) <= 1  # each byte leaves the store once
    reached, waiting, hops = {owner}, deque([(owner, 0)]), 0
    while waiting:
        rank, hops = waiting.popleft()
        for target in routes[rank].targets:
            assert routes[target].source == rank
            assert target not in reached
            reached.add(target)
            waiting.append((target, hops + 1))
    assert reached == {owner, *cluster.compute_ranks}
    for rank in set(range(cluster.size)) - reached:
        assert routes[rank].source is None
        assert not routes[rank].targets
    if chain_below == 1:
        assert hops <= 1 + max(1, cluster.workers).bit_length()


@settings(max_examples=300)
@given(clusters(), st.data())
def test_a_sum_over_ranks_is_the_contracts_tree(cluster: Cluster, data: st.DataObject) -> None:
    groups = data.draw(st.integers(cluster.workers, 3 * cluster.workers + 5))
    owner = data.draw(st.sampled_from(cluster.memory_ranks))
    plan = reduce_plan(cluster, groups, owner, data.draw(st.integers(0, 100)))
    sums = {
        rank: {node: contract(*node) for node in subtrees(groups, cluster.groups_of(rank, groups))}
        for rank in range(cluster.size)
    }
    sent: dict[tuple[int, int], deque[tuple[tuple[int, int], str]]] = {}
    todo = {rank: deque(steps) for rank, steps in plan.items()}
    handed = dict.fromkeys(range(cluster.size), 0)
    taken = dict.fromkeys(range(cluster.size), 0)
    while any(todo.values()):
        before = sum(map(len, todo.values()))
        for rank, steps in todo.items():
            while steps:
                step = steps[0]
                if isinstance(step, Merge | Take) and not sent.get((step.source, rank)):
                    break  # it waits
                steps.popleft()
                own = sums[rank]
                match step:
                    case Hand(node, to):
                        sent.setdefault((rank, to), deque()).append((node, own.pop(node)))
                        handed[rank] += 1
                    case Merge(node, other, source, parent):
                        assert sent[source, rank][0][0] == other
                        _, value = sent[source, rank].popleft()
                        left, right = (own.pop(node), value) if node < other else (value, own.pop(node))
                        own[parent] = f"({left}+{right})"
                        taken[rank] += 1
                    case Join(node, other, parent):
                        own[parent] = f"({own.pop(node)}+{own.pop(other)})"
                    case Take(node, source):
                        assert sent[source, rank][0][0] == node
                        own[node] = sent[source, rank].popleft()[1]
                        taken[rank] += 1
        assert sum(map(len, todo.values())) < before, "every rank waits for another"
    assert sums.pop(owner) == {(0, groups): contract(0, groups)}
    assert not any(sums.values())
    assert not any(sent.values())
    most = max(len(subtrees(groups, cluster.groups_of(rank, groups))) for rank in cluster.compute_ranks)
    assert all(count <= most + 1 for count in handed.values())
    if owner not in cluster.compute_ranks:
        assert taken[owner] == 1  # each byte comes to the store once
    if groups % cluster.workers == 0 and groups & (groups - 1) == 0 and cluster.workers & (cluster.workers - 1) == 0:
        assert all(count <= 1 for rank, count in handed.items() if rank != owner)


@given(clusters(), st.integers(0, 30), st.integers(1, 200))
def test_shares_are_whole_groups_in_order(cluster: Cluster, more: int, micro_batches: int) -> None:
    groups = cluster.workers + more
    shares = [cluster.share(rank, micro_batches, groups) for rank in cluster.compute_ranks]
    assert [index for share in shares for index in share] == list(range(micro_batches))
    of = [cluster.groups_of(rank, groups) for rank in cluster.compute_ranks]
    assert [group for share in of for group in share] == list(range(groups))
    for share in of:
        nodes = subtrees(groups, share)
        assert [group for low, high in nodes for group in range(low, high)] == list(share)
