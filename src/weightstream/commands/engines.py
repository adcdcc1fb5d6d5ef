"""From a configuration to engines: the run's own, and one that is only asked and leaves nothing behind."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from weightstream.commands.sizing import Choice, choose, trained_with
from weightstream.config.architectures import architecture
from weightstream.config.config import RunConfig
from weightstream.engine.engine import Engine
from weightstream.engine.multiplying import AutoKernels
from weightstream.hub import initial_values
from weightstream.launch.ranks import ALONE, RunRanks
from weightstream.machine.profile import DEFAULT_PATH, Profile, load_profile
from weightstream.machine.sparsity import auto_kernels
from weightstream.nn import Pool
from weightstream.sparse.kernels import Kernel
from weightstream.store.glance import glance
from weightstream.store.optimizers import Optimizer

Say = Callable[[str], None]


def engine_settings(config: RunConfig, say: Say = lambda text: None) -> dict[str, Any]:
    """The keywords of `Engine` that a configuration gives."""
    settings = config.engine
    return {
        "clip_norm": config.training.clip_norm,
        "precision": settings.precision,
        "device": settings.device,
        "device_memory": settings.device_memory,
        "host_memory": settings.host_memory,
        "seed": config.seed,
        "reduction_groups": settings.reduction_groups,
        "threads_per_worker": settings.threads_per_worker,
        "max_block_bytes": settings.max_block_bytes,
        "panel_elements": settings.panel_elements,
        "block_rules": settings.block_rules,
        "activations": settings.activations,
        "prefetch": settings.prefetch,
        "ram_tier": settings.ram_tier,
        "max_skipped_steps": settings.max_skipped_steps,
        "commit_every": settings.commit_every,
        "allow_other_numerics": settings.allow_other_numerics,
        "sparsity": config.sparsity.settings(config.training.steps),
        "kernels": _kernels(config, say),
        "experts_memory": settings.experts_memory,
        "experts_pool": {pool.pattern: Pool(pool.limit, pool.when_full) for pool in settings.experts_pool} or None,
        "compaction_share": settings.compaction_share,
    }


def _kernels(config: RunConfig, say: Say) -> Mapping[str, Kernel] | AutoKernels:
    """Which products are by kernels; `auto` by this machine's profile, if it was ever measured."""
    kernels = config.sparsity.kernels
    if kernels != "auto":
        return kernels
    training = config.training
    return auto_kernels(tokens=training.micro_batch_size * training.sequence_length, warn=say)


def threads_of(config: RunConfig) -> int | None:
    """Threads of each rank: as configured, else as the store was made with, which decide bits."""
    if config.engine.threads_per_worker is not None:
        return config.engine.threads_per_worker
    found = glance(config.store)
    return None if found is None else found.contract.get("numerics", {}).get("threads_per_worker")


def weights_of(config: RunConfig, say: Say) -> Mapping[str, Tensor] | None:
    """The weights of the model's folder, if a new store is to begin with them."""
    folder = config.model.path
    if folder is None or not config.model.weights:
        return None
    _, build = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    found = initial_values(folder.expanduser(), build, config.store)
    if found is not None:
        say(f"training starts from the {len(found)} tensors of {folder}")
    return found


def engine_of(
    config: RunConfig,
    store: Path,
    build: Callable[[], nn.Module],
    say: Say | None,
    initial: Mapping[str, Tensor] | None = None,
    ranks: RunRanks = ALONE,
    unlike: Callable[[str], bool] | None = None,
) -> Engine:
    """An engine on `store`, as a run of the configuration has it.

    Args:
        initial: values of a new store instead of the model's own.
        unlike: of which parameters the store does not show the density that the run's will have.
    """
    optimizer = Optimizer.from_json(config.optimizer.to_json(config.training.steps))
    settings = engine_settings(config, say or (lambda text: None))
    if unlike is not None and isinstance(settings["kernels"], AutoKernels):
        settings["kernels"] = replace(settings["kernels"], unlike=unlike)
    threads = threads_of(config)
    if ranks.links is not None:  # the first rank has the store, and hosts may differ in cores
        threads = ranks.gather(threads or torch.get_num_threads())[0]
    settings["threads_per_worker"] = threads
    return Engine(
        build, store, optimizer, log=say, initial=initial, cluster=ranks.cluster, links=ranks.links, **settings
    )


@contextmanager
def temporary(config: RunConfig, say: Say | None = None) -> Iterator[Engine]:
    """An engine as the run would have it, before there is any text: its store is a temporary one beside the run's own.

    The tokenizer is taken to have all the tokens that were asked for. Weights are not read, and masks that would follow from
    them are random ones: of as many non-zeros, or where only weights tell how many, of the share that the group asks for;
    `kernels: auto` takes none of these then, as the run's own store does not know their density when it chooses.
    """
    settings = config.sparsity.settings(config.training.steps)

    def uncounted(name: str) -> bool:
        group = settings.group_of(name)
        return group is not None and not group.counted and group.given is None

    groups = [
        group.model_copy(update={"init": "random"})
        if group.init in ("magnitude", "zeros") and group.algorithm != "gmp"
        else group
        for group in config.sparsity.groups
    ]
    sparsity = config.sparsity.model_copy(update={"groups": tuple(groups)})
    config = config.model_copy(update={"sparsity": sparsity})
    _, build = architecture(config.model, vocabulary=config.data.tokenizer.size, end_of_text=0)
    near = next(folder for folder in config.store.absolute().parents if folder.is_dir())
    with TemporaryDirectory(prefix=".weightstream-plan-", dir=near) as folder:
        engine = engine_of(config, Path(folder) / "store", build, say, unlike=uncounted)
        try:
            yield engine
        finally:
            engine.close()


def chosen_of(config: RunConfig, profile: Path | None, say: Say) -> Choice:
    found = trained_with(config.store, config)
    if found is not None:
        return found
    with temporary(config) as engine:
        return choose(engine, config, profile_of(profile, say))


def profile_of(path: Path | None, say: Say) -> Profile | None:
    """That one, which must be there; or the one of this machine, if it was ever measured."""
    if path is None and not DEFAULT_PATH.expanduser().exists():
        return None
    return load_profile(path or DEFAULT_PATH, say)
