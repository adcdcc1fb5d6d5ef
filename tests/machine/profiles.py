"""A profile by hand: round numbers, so that what is computed from it can be computed in the head."""

from typing import Any

from weightstream.machine.profile import Profile

SIZES, LENGTHS, ELEMENTS = (16, 256), (64, 256), (1024, 65536)


def profile(**changes: Any) -> Profile:
    """1 GFLOP/s of products, 1 ns for an element of anything else, 1 GB/s of everything that moves."""
    compute = {
        "threads": 1,
        "products": {f"{layout} {dtype}": (1e9,) * 8 for layout in ("nn", "nt", "tn") for dtype in ("bfloat16", "float32")},
        "attention": {
            f"{name} {mask} {dtype}": (1e9,) * 2
            for name in ("attention", "attention_backward") for mask in ("causal", "full") for dtype in ("bfloat16", "float32")
        },
        "kernels": {"mul float32": (1.024e-6, 65.536e-6)},
        "sums": {f"{what} {dtype}": 1e-9 for what in ("copy", "add") for dtype in ("bfloat16", "float32")} | {"squares": 1e-9},
        "optimizer": {"AdamW": 1e-9}, "scale_s": 1e-9, "cast_s": {"bfloat16": 1e-9, "float32": 1e-9},
        "checksum_bytes_per_s": 1e9,
    }  # fmt: skip
    whole = {
        "measured_at": "2026-01-01T00:00:00+00:00",
        "machine": {"processor": "abacus", "cores": 2, "memory_bytes": 1 << 30, "torch": "2.0"},
        "product_sizes": SIZES, "attention_lengths": LENGTHS, "attention_width": 64, "kernel_elements": ELEMENTS,
        "compute": [compute, {**compute, "threads": 2, "products": dict.fromkeys(compute["products"], (2000000000.0,) * 8)}],
        "memory_bytes_per_s": 1e9,
        "disk": {"read_bytes_per_s": 1e9, "write_bytes_per_s": 1e9, "together": 1.0, "latency_s": 0.0, "sync_s": 0.0},
        "link": {"broadcast_bytes_per_s": 2e9, "reduce_bytes_per_s": 1e9, "latency_s": 1e-4, "gather_s": 1e-3,
                 "broadcast_cpu_s_per_byte": 1e-9, "reduce_cpu_s_per_byte": 1e-9},
        "executor": {
            "operation_s": {"forward": 1e-4, "begin": 1e-3}, "kernel_s": {"forward": 1e-6, "backward": 1e-6},
            "tensor_s": {"reduce": 1e-5, "update": 1e-5}, "between_steps_s": 1e-3, "process_bytes": 1 << 20,
        },
        "codec": {"clear_bytes_per_s": 1e9, "decode_s": 1e-9, "expand_s": {1: 1e-9, 32: 1e-10},
                  "gather_s": {1: 1e-9, 32: 1e-10}},
        "sparse": [{"kernel": "gathered", "dtype": "float32", "block": (32, 32), "tokens": 512, "threads": 1,
                    "densities": (0.01, 0.1, 1.0), "speedups": (100.0, 10.0, 0.1)}],
        "contention": {"io_compute_s_per_byte": 0.0, "ranks": {"2x1": 1.25, "4x1": 2.5}},
    }  # fmt: skip
    return Profile.model_validate(whole | changes)
