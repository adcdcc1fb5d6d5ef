"""Checksums of parts: xxh3_64 over the digests of their chunks, so that any thread can work on any chunk.

The disk's threads check what they move. Where compute is about to use all of a record, or has just made it, it is
better done here, by all cores at once: beside compute each checked byte costs a core that compute then waits for.
"""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash

_pools: dict[int, ThreadPoolExecutor] = {}


def part_checksums(count: int, owners: Iterable[int], chunk_digests: Iterable[bytes]) -> list[int]:
    """The checksum of each of `count` parts: xxh3_64 over the digests of its chunks; `owners` says whose each is."""
    by_part: list[list[bytes]] = [[] for _ in range(count)]
    for owner, digest in zip(owners, chunk_digests, strict=True):
        by_part[owner].append(digest)
    return [xxhash.xxh3_64_intdigest(b"".join(digests)) for digests in by_part]


def checksums(parts: Sequence[memoryview], chunk_bytes: int) -> list[int]:
    """The checksum of each part, by as many threads as torch computes with, this one among them."""
    chunks = [
        (index, part[start : start + chunk_bytes])
        for index, part in enumerate(parts)
        for start in range(0, part.nbytes, chunk_bytes)
    ]
    digests = [b""] * len(chunks)
    numbers, lock = iter(range(len(chunks))), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            digests[number] = xxhash.xxh3_64_digest(chunks[number][1])  # lets the interpreter's lock go

    helpers = min(torch.get_num_threads(), len(chunks)) - 1
    helping = [_pool(helpers).submit(work) for _ in range(helpers)]
    work()
    for helper in helping:
        helper.result()
    return part_checksums(len(parts), (index for index, _ in chunks), digests)


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="store-check")
    return _pools[threads]
