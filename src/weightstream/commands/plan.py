"""`weightstream plan`: what a run would use and how long it would take, found out without its text."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightstream.commands.engines import Say, chosen_of, profile_of, temporary
from weightstream.commands.outcome import state_bytes
from weightstream.commands.sizing import divided, micro_batch_of, predicted_step, rehearse_step
from weightstream.config.config import RunConfig
from weightstream.engine.engine import Engine
from weightstream.engine.plan_text import experts_moved, flows_now, plan_text, reach_of
from weightstream.prediction.predicting import Stretch, census_of, commonest, prediction_text, stretches


def plan(config: RunConfig, say: Say, profile: Path | None = None) -> dict[str, Any]:
    """What a run would use, found out without the text and without leaving anything behind; and, where this machine has
    been measured, how long it would take."""
    chosen = chosen_of(config, profile, say) if config.training.micro_batch == "auto" else None
    config = config if chosen is None else divided(config, chosen)
    with temporary(config, say) as engine:
        rehearse_step(engine, config)
        cluster, micro_batches = config.cluster.roles, config.training.micro_batches
        pieces = _predicted(engine, config, say, profile)
        step = commonest(pieces).step if pieces else None
        whose: dict[str, Any] = {"cluster": cluster, "micro_batches": micro_batches, "step": step}
        _, allotment = engine.outlook.planned_for(cluster, micro_batches)
        flows, (own, dense) = flows_now(engine, **whose), reach_of(engine)
        experts = experts_moved(engine, cluster, micro_batches)
        disk_bytes = shutil.disk_usage(engine.store.path).total
        each = config.training.micro_batch_size * config.training.sequence_length
        told = "seconds per step  not known: run `weightstream calibrate` first"
        if pieces:
            told = prediction_text(pieces, tokens_per_micro_batch=each, disk_bytes=disk_bytes)
        return {
            "text": "\n".join(
                [
                    plan_text(engine, **whose),
                    *_unsettled(config),
                    *([] if chosen is None else [chosen.describe()]),
                    told,
                ]
            ),
            "micro_batches": micro_batches,
            "micro_batch_size": config.training.micro_batch_size,
            "prefetch": config.engine.prefetch,
            "predicted": _figures(pieces, each),
            "parameters": sum(block.numel for block in engine.store.blocks),
            "state_bytes": state_bytes(engine.store),
            "device_bytes": allotment.device_bytes,
            "host_bytes": allotment.host_bytes,
            "read_bytes_per_step": flows.disk_read.planned,
            "written_bytes_per_step": flows.disk_written.planned,
            "moved_per_step": flows.to_json(),
            "experts_per_step": None if experts is None else experts.to_json(),
            "room_parameters": {"disk": own.disk, "ram": own.ram},
            "room_parameters_dense": None if dense is None else {"disk": dense.disk, "ram": dense.ram},
            "kernels": engine.kernels,
            "blocks": [
                {
                    "name": block.name,
                    "parameters": block.numel,
                    "resident": block.resident,
                    "trainable": block.trainable,
                }
                for block in engine.store.blocks
            ],
        }


def _unsettled(config: RunConfig) -> list[str]:
    """What a plan does not know of sparse parameters."""
    groups = config.sparsity.settings(config.training.steps).groups
    return [
        f"masks of {', '.join(group.patterns)}: how many non-zeros each parameter has is found from the weights when the "
        f"store is made; planned here as {1 - group.sparsity_at(0):.0%} of each"
        for group in groups
        if group.settled and not group.counted and group.given is None
    ]


def _predicted(engine: Engine, config: RunConfig, say: Say, path: Path | None) -> list[Stretch]:
    """The run as it is predicted; nothing without a profile."""
    profile = profile_of(path, say)
    if profile is None:
        return []
    training, census = config.training, census_of(engine, micro_batch_of(config.training))
    return stretches(
        engine,
        training.steps,
        lambda step: predicted_step(
            engine, config, profile, size=training.micro_batch_size, micro_batches=training.micro_batches, step=step,
            census=census,
        ),
    )  # fmt: skip


def _figures(pieces: Sequence[Stretch], tokens_per_micro_batch: int) -> dict[str, Any] | None:
    if not pieces:
        return None
    found = commonest(pieces).found
    return {
        "seconds_per_step": found.seconds_per_step,
        "binds": found.binds,
        "compute_s": found.compute_s,
        "optimizer_s": found.optimizer_s,
        "disk_s": found.disk_s,
        "link_s": found.link_s,
        "compute_bound_tokens_per_step": found.compute_bound_micro_batches() * tokens_per_micro_batch,
        "run_s": sum(piece.found.seconds_per_step * piece.steps for piece in pieces),
        "run_written_bytes": sum(piece.found.written_bytes * piece.steps for piece in pieces),
        "steps_like": [
            {"step": piece.step, "steps": piece.steps, "seconds_per_step": piece.found.seconds_per_step}
            for piece in pieces
        ],
    }
