"""How well sparse training trains: held-out loss by algorithm, on the Python standard library's source text.

    python benchmarks/sparse_quality.py --json                  # all runs that are not done yet, then the result
    python benchmarks/sparse_quality.py --only rigl-0 gmp-0     # these; the result waits for the others
    python benchmarks/sparse_curves.py --write                  # table and plots of what was found

`weightstream fit` with one configuration but for `sparsity:`, for the same steps, on the same batches, from the same
initial values: dense; a random mask that stays, SET and RigL (by the gradient as its paper has it, and by the gradient
relative to rows and columns) at 90% of every layer's matrices; gradual magnitude pruning (GMP) to 80%; and SPDF, 75%
under a random mask until three quarters of the steps are done, then dense. Seeds change initial values, masks and the
order of batches. A run that was interrupted goes on from its store, one that is done is kept in the scratch folder until
all of them are.

Keys: `trained` (by run: held-out loss at several steps, training loss, density and turnover of masks), `loss` (by
algorithm: mean at the end, least and most of the seeds), `order` (what the literature leads one to expect, whether it
held on the mean, by how much, and by how much for each seed).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from results import SCRATCH, provenance, write
from rich.console import Console
from scratch import lasting
from sparse_curves import ALGORITHMS

from weightstream.commands.run import fit
from weightstream.config.config import RunConfig, check_config
from weightstream.training.metrics import read_metrics

NAME = "sparse_quality"
LAYER_MATRICES = ("*.self_attn.*", "*.mlp.*")
BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 0.1, 1.0


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    names = [f"{algorithm}-{seed}" for seed in range(arguments.seeds) for algorithm in ALGORITHMS]
    asked = asked_for(arguments.only, names)
    with lasting(arguments.scratch, NAME) as folder:
        require_same_settings(folder, settings(arguments))
        for name in asked:
            if not (folder / f"{name}.json").exists():
                train(name, arguments, folder)
        missing = [name for name in names if not (folder / f"{name}.json").exists()]
        if missing:
            print(f"still to do: {' '.join(missing)}", file=sys.stderr)
            return
        runs = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
        result = {"benchmark": NAME} | settings(arguments) | findings(runs) | provenance(arguments.seeds)
        write(NAME, result, as_json=arguments.json, record=not arguments.no_record)
        shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="runs such as rigl-0")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for stores and finished runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-record", action="store_true", help="keep nothing under results/")
    return parser.parse_args()


def add_setting(parser: argparse.ArgumentParser, *, layers: int = 6, width: int = 384) -> None:
    """The options that say what is trained, on what and how long."""
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--source", default="stdlib", help="the text: stdlib, a file, a folder or a pattern")
    parser.add_argument("--steps", type=int, default=336)
    parser.add_argument("--sequences", type=int, default=8, help="of one step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--held-out", type=int, default=96, help="sequences that are held out and evaluated")
    parser.add_argument("--evaluations", type=int, default=6, help="during training, beside the one before it")
    parser.add_argument("--lr", type=float, default=2e-3)


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_setting` asked for."""
    names = ("layers", "width", "vocabulary", "source", "steps", "sequences", "length", "held_out", "evaluations", "lr")
    return {name: getattr(arguments, name) for name in names}


def is_layer_matrix(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in LAYER_MATRICES)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common, and decides what they come to."""
    groups = {algorithm: group_of(algorithm, arguments.steps) for algorithm in ALGORITHMS}
    return setting_of(arguments) | {
        "precision": arguments.precision, "threads": arguments.threads, "groups": groups,
    }  # fmt: skip


def asked_for(only: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The runs that `--only` names, or all.

    Raises:
        SystemExit: there is no such run.
    """
    unknown = set(only) - set(names)
    if unknown:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    return only or names


def require_same_settings(folder: Path, wanted: dict[str, Any]) -> None:
    """
    Raises:
        SystemExit: the folder has runs with other settings.
    """
    note = folder / "settings.json"
    if not note.exists():
        note.write_text(json.dumps(wanted), encoding="utf-8")
    found = json.loads(note.read_text(encoding="utf-8"))
    other = [f"{key} {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    if other:
        raise SystemExit(f"{folder} holds runs with {'; '.join(other)}: give these settings, or remove the folder")


def group_of(algorithm: str, steps: int) -> dict[str, Any] | None:
    """The entry of `sparsity.groups`. Masks of SET and RigL move until three quarters of the steps are done, by a part
    that falls from 0.3 along a cosine; GMP prunes from a tenth to seven tenths, by the cubic law."""
    moving = {"sparsity": 0.9, "drop_fraction": 0.3, "every": max(1, steps // 14), "end": steps * 3 // 4}
    pruning = {"sparsity": 0.8, "begin": steps // 10, "every": max(1, steps // 40), "end": steps * 7 // 10}
    own: dict[str, dict[str, Any] | None] = {
        "dense": None,
        "static": {"algorithm": "static", "sparsity": 0.9},
        "set": {"algorithm": "set"} | moving,
        "rigl": {"algorithm": "rigl"} | moving,
        "rigl_relative": {"algorithm": "rigl", "grow_by": "relative_gradient"} | moving,
        "gmp": {"algorithm": "gmp"} | pruning,
        "spdf": {"algorithm": "static", "sparsity": 0.75, "dense_from": steps * 3 // 4},
    }
    return own[algorithm]


def config_of(name: str, arguments: argparse.Namespace, out: Path) -> RunConfig:
    """The run's configuration, as a YAML file would hold it.

    Granite is Llama with factors. Embeddings are scaled by the root of the width: as small as Llama's begin, what layers
    add at first drowns them, so that a dense model of this size learns for hundreds of steps hardly more than how
    frequent tokens are, while a sparse one, whose layers add less, does not suffer.
    """
    algorithm, _, seed = name.partition("-")
    group = group_of(algorithm, arguments.steps)
    width = arguments.width
    heads = max(1, width // 64)
    values = {
        "model": {
            "model_type": "granite", "hidden_size": width, "intermediate_size": width * 8 // 3,
            "num_hidden_layers": arguments.layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": arguments.length, "attention_multiplier": 64**-0.5,
            "embedding_multiplier": width**0.5, "tie_word_embeddings": False,
        },
        "data": {"sources": [arguments.source], "tokenizer": {"size": arguments.vocabulary}},
        "optimizer": {
            "name": "AdamW", "lr": arguments.lr, "schedule": "cosine", "warmup": arguments.steps // 20,
            "end": arguments.lr / 10, "weight_decay": WEIGHT_DECAY, "settings": {"betas": list(BETAS)},
        },
        "training": {
            "steps": arguments.steps, "micro_batches": 1, "micro_batch_size": arguments.sequences,
            "sequence_length": arguments.length, "clip_norm": CLIP_NORM, "tensorboard": False,
            "validation": {
                "every": max(1, arguments.steps // arguments.evaluations), "sequences": arguments.held_out,
            },
        },
        "sparsity": {"groups": [] if group is None else [{"patterns": LAYER_MATRICES} | group]},
        "engine": {
            "precision": arguments.precision, "device_memory": "1GiB", "host_memory": "2GiB", "reduction_groups": 1,
            "threads_per_worker": arguments.threads, "commit_every": "60s",
        },
        "seed": int(seed),
        "out": str(out),
    }  # fmt: skip
    return check_config(values, source=name)


def train(name: str, arguments: argparse.Namespace, folder: Path) -> None:
    """One run to its end, from wherever it stands; what it found is kept, its store is not.

    Raises:
        SystemExit: somebody asked it to stop.
    """
    out, text = folder / name, folder / "data"
    text.mkdir(exist_ok=True)
    out.mkdir(exist_ok=True)
    if not (out / "data").is_symlink():
        (out / "data").symlink_to(text.absolute(), target_is_directory=True)  # prepared once for all runs
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"== {name}")
    report = fit(config_of(name, arguments, out), console)
    if report["stopped_by"]:
        raise SystemExit(
            f"stopped by {report['stopped_by']} at step {report['step']} of {name}; the same command goes on"
        )
    algorithm, _, seed = name.partition("-")
    found = {"algorithm": algorithm, "seed": int(seed), "parameters": report["parameters"]}
    found |= measured(out, arguments.steps) | {"commit": provenance(1)["commit"]}
    unfinished = folder / f"{name}.unfinished"
    unfinished.write_text(json.dumps(found), encoding="utf-8")
    unfinished.replace(folder / f"{name}.json")
    shutil.rmtree(out)


def measured(out: Path, steps: int) -> dict[str, Any]:
    """The curves in a run's metrics; the last loss on held-out text is that of the trained model."""
    lines = read_metrics(out / "metrics.jsonl")
    trained = [line["loss"] for line in lines if line["kind"] == "train"]
    portion = max(1, steps // 30)
    held_out = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    masks = {
        kind: [[line["step"], _mean_of(line)] for line in lines if line["kind"] == kind]
        for kind in ("density", "turnover")
    }
    return {
        "loss": held_out[steps],
        "validation": [list(point) for point in sorted(held_out.items())],
        "train": [
            [min(first + portion, steps), mean(trained[first : first + portion])] for first in range(0, steps, portion)
        ],
        **masks,
        "seconds_per_step": mean(line["seconds"] for line in lines if line["kind"] == "train"),
    }  # fmt: skip


def _mean_of(line: dict[str, Any]) -> float:
    return mean(value for key, value in line.items() if key not in ("kind", "step", "time"))


def findings(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs, their losses by algorithm, and which expectations held."""
    by_seed: dict[str, list[float]] = {
        algorithm: [run["loss"] for run in runs if run["algorithm"] == algorithm] for algorithm in ALGORITHMS
    }
    return {
        "parameters": runs[0]["parameters"],
        "loss": {
            algorithm: {"mean": mean(losses), "spread": [min(losses), max(losses)], "by_seed": losses}
            for algorithm, losses in by_seed.items()
        },
        "order": [_held(*each, by_seed) for each in expectations()],
        "trained": list(runs),
    }


def expectations() -> Iterator[tuple[str, str, str, float]]:
    """What is expected of losses: its text, and `better`, `worse`, `part`: the loss of `better` exceeds that of dense by
    at most `part` of what `worse` exceeds it by."""
    yield "RigL no worse than SET", "rigl", "set", 1.0
    yield "RigL by relative gradients no worse than SET", "rigl_relative", "set", 1.0
    yield "SET no worse than static", "set", "static", 1.0
    yield "GMP near dense: less than half of what static loses", "gmp", "static", 0.5
    yield "SPDF no worse than static", "spdf", "static", 1.0
    yield "dense no worse than SPDF", "dense", "spdf", 1.0


def _held(what: str, better: str, worse: str, part: float, by_seed: dict[str, list[float]]) -> dict[str, Any]:
    """Whether it held; `by` is by how much, in nats: below zero it did not."""
    margins = [
        part * (two - dense) - (one - dense)
        for one, two, dense in zip(by_seed[better], by_seed[worse], by_seed["dense"], strict=True)
    ]
    return {"expected": what, "held": mean(margins) >= 0, "by": mean(margins), "by_seed": margins}


if __name__ == "__main__":
    main()
