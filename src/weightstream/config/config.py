"""A run's configuration: YAML plus `key=value` overrides, checked as a whole before anything starts.

Each section's class stands beside the code that it configures; here they are put together. A key that nobody knows is
refused with the nearest one that is known, all problems are told at once, and nothing is taken from the environment.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from weightstream.cluster import Cluster
from weightstream.data.dataset import DataConfig
from weightstream.errors import ConfigError
from weightstream.section import Bytes, Section
from weightstream.sparse.section import SparsityConfig
from weightstream.training.settings import TrainingConfig
from weightstream.units import parse_bytes


class ModelConfig(Section):
    """`model`: a folder with a transformers `config.json`; `model_type` or `architecture` and that config's keys; or
    `factory` and that function's arguments.

    `model: some/folder` is short for `model: {path: some/folder}`.
    """

    model_config = ConfigDict(extra="allow")  # keys of the transformers configuration, or arguments; checked when used

    path: Path | None = None
    """A folder with config.json; weights in it are where training starts, unless `weights` is false."""
    weights: bool = True
    """Whether weights in `path` are imported into a new store."""
    architecture: str | None = None
    """A class of transformers, such as LlamaForCausalLM; by default the causal language model of `model_type`."""
    model_type: str | None = None
    """A transformers model type, such as llama, gpt2 or mixtral."""
    factory: str | None = None
    """A function or class of one's own that builds the model: `module:name` or `file.py:name`; other keys are its
    arguments."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _says_which(self) -> "ModelConfig":
        named = {"path": self.path, "architecture": self.architecture, "model_type": self.model_type}
        given = [key for key, value in named.items() if value is not None]
        if self.factory is None and not given:
            raise ValueError(
                "expected path, model_type or architecture, or a factory, found none of them; give for example 'llama'"
            )
        if self.factory is not None and given:
            raise ValueError(f"expected factory alone, found {', '.join(given)} besides; leave one of them out")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The keys meant for the transformers configuration, or the factory."""
        return dict(self.model_extra or {})


class GroupConfig(Section):
    """One entry of `optimizer.groups`: parameters by name pattern; the first that matches counts."""

    pattern: str = Field(min_length=1)
    lr_scale: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimizerConfig(Section):
    """`optimizer`: which one, the learning rate as a function of the step, and the optimizer's own settings."""

    name: str = "AdamW"
    """AdamW, SGD, Lion, Adafactor, or `torch.` and a class of torch.optim, such as torch.NAdam."""
    lr: float = Field(default=3e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    """Where the schedule ends; by default at `training.steps`."""
    end: float = Field(default=0.0, ge=0)
    """The learning rate at the schedule's end."""
    decay: int | None = Field(default=None, ge=1)
    """For wsd: how many of the last steps decay; by default a tenth."""
    weight_decay: float = Field(default=0.1, ge=0)
    groups: tuple[GroupConfig, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    """What else the optimizer's class takes, such as betas: [0.9, 0.95]."""

    def to_json(self, training_steps: int) -> dict[str, Any]:
        """The form that `weightstream.store.optimizer.Optimizer.from_json` reads."""
        steps = self.steps or training_steps
        schedule: dict[str, Any] = {"schedule": self.schedule, "lr": self.lr, "warmup": self.warmup}
        if self.schedule != "constant":
            schedule |= {"steps": steps, "end": self.end}
        if self.schedule == "wsd":
            schedule["decay"] = self.decay or max(1, steps // 10)
        common = {
            "lr": schedule,
            "weight_decay": self.weight_decay,
            "groups": [group.model_dump() for group in self.groups],
        }
        if self.name.startswith("torch."):
            place = "torch.optim:" + self.name.removeprefix("torch.")
            return {"class": "Torch", "optimizer_class": place, "arguments": self.settings, **common}
        known = {"adamw": "AdamW", "sgd": "SGD", "lion": "Lion", "adafactor": "Adafactor"}
        if self.name.lower() not in known:
            options = (*known.values(), "torch.NAdam and the like")
            raise ConfigError(f"optimizer.name: expected one of {', '.join(options)}; found {self.name!r}")
        return {"class": known[self.name.lower()], **self.settings, **common}


def _limit(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 1:
            return value
    elif isinstance(value, str) and parse_bytes(value) >= 1:
        return value
    raise ValueError(f"expected a number of experts, or bytes as text such as '20GiB', at least 1; found {value!r}")


class PoolConfig(Section):
    """One entry of `engine.experts_pool`: how many experts may come to exist; see `weightstream.nn.Pool`."""

    pattern: str = Field(default="*", min_length=1)
    """Shell-style, of names of layers; those of one pattern share the pool."""
    limit: Annotated[int | str, BeforeValidator(_limit)]
    """A number of experts, or bytes of their records as text."""
    when_full: Literal["refuse", "existing"] = "refuse"


def _pools(value: Any) -> Any:
    """One pool for all layers may be written as itself, or as its limit."""
    if value is None or isinstance(value, list | tuple):
        return value or ()
    return [value if isinstance(value, Mapping | PoolConfig) else {"limit": value}]


def _different(value: tuple[PoolConfig, ...]) -> tuple[PoolConfig, ...]:
    patterns = [pool.pattern for pool in value]
    twice = next((pattern for pattern in patterns if patterns.count(pattern) > 1), None)
    if twice is not None:
        raise ValueError(f"expected one pool for each pattern, found {twice!r} more than once; leave one of them out")
    return value


class EngineConfig(Section):
    """`engine`: budgets and how to compute; see `weightstream.Engine`."""

    device: str = "cpu"
    device_memory: Bytes = Field(default="512MiB")  # type: ignore[assignment]
    """Bounds slabs, gradient sums and activations."""
    host_memory: Bytes = Field(default="4GiB")  # type: ignore[assignment]
    """Bounds the RAM tier, I/O buffers, staged gradients and spilled activations."""
    precision: Literal["fp32", "bf16"] = "bf16"
    activations: Literal["auto", "keep", "recompute"] = "auto"
    prefetch: int = Field(default=2, ge=1)
    ram_tier: bool = True
    """Whether records may stay in RAM between uses, within `host_memory`."""
    reduction_groups: int = Field(default=8, ge=1, le=1 << 16)
    threads_per_worker: int | None = Field(default=None, ge=1)
    max_block_bytes: Bytes | None = None
    block_rules: dict[str, Literal["block", "split", "resident"]] = Field(default_factory=dict)
    """By pattern of module names, first match wins, over the rules that split a model into blocks."""
    panel_elements: int | None = Field(default=None, ge=1)
    """Size of the units that a block is stored in, and from which on a tensor is cut; fixed when the store is made."""
    max_skipped_steps: int = Field(default=10, ge=1)
    commit_every: int | str = 1
    """Steps from one commit to the next, or a time such as `30s`."""
    allow_other_numerics: bool = False
    experts_memory: Bytes = Field(default="1GiB")  # type: ignore[assignment]
    """For the experts that one step reaches; of no effect on a model that has none."""
    experts_pool: Annotated[tuple[PoolConfig, ...], BeforeValidator(_pools), AfterValidator(_different)] = ()
    """How many experts may come to exist; the first entry whose pattern matches a layer counts."""
    compaction_share: float = Field(default=0.25, gt=0, le=1)
    """Bytes that compaction may write for each byte of experts that steps write."""


def _memory(value: Any) -> Any:
    if value == "colocated" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"expected 'colocated', or how many ranks own the records, at least 1; found {value!r}")


class ClusterConfig(Section):
    """`cluster`: how many processes work together, and how they find each other. A resumed run may change all of it."""

    workers: int = Field(default=1, ge=1)
    """Ranks that compute."""
    memory: Annotated[int | Literal["colocated"], BeforeValidator(_memory)] = "colocated"
    """Every worker owns its part of the records; or that many ranks own them, which do not compute."""
    timeout_s: float = Field(default=300.0, gt=0, le=1e6)
    """How long a rank waits for another one before it takes it to be lost."""
    restarts: int = Field(default=3, ge=0)
    """How many times in a row, without a step committed in between, ranks are started anew after one was lost."""
    address: str = Field(default="127.0.0.1", min_length=1)
    """This host's address, or the name of its network interface, on which ranks listen."""
    port: int = Field(default=0, ge=0, lt=1 << 16)
    """The rendezvous's port on one host; 0 takes a free one."""

    @property
    def roles(self) -> Cluster:
        """Who computes, and who owns records."""
        return Cluster(self.workers, self.memory)


class RunConfig(Section):
    """Everything that `weightstream fit` needs."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    engine: EngineConfig = EngineConfig()
    sparsity: SparsityConfig = SparsityConfig()
    cluster: ClusterConfig = ClusterConfig()
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    out: Path = Path("runs/run")
    """The run's folder: the store, prepared text, metrics, and the configuration itself."""

    @property
    def store(self) -> Path:
        return self.out / "store"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, or the run folder that one left behind, and apply `key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or a key or value is not what it should be; all problems at once.
    """
    file = path / "config.yaml" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {file}: {_reason(error)}; give a YAML file or a run's folder"
        ) from None
    values = _parse(text, str(file))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected sections such as model: and data:, found {type(values).__name__}")
    return check_config(with_overrides(values, overrides), source=str(file))


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values, changed by `key=value` texts.

    Raises:
        ConfigError: an override that is none.
    """
    for override in overrides:
        _override(values, override)
    return values


def check_config(values: Mapping[str, Any], *, source: str) -> RunConfig:
    """The configuration of plain values.

    Raises:
        ConfigError: a key or value is not what it should be.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, values) for problem in error.errors(include_url=False)]
        raise ConfigError("\n  ".join([f"{source}: {len(problems)} problem(s)", *dict.fromkeys(problems)])) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML has it, except: `3e-4` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused as no key at all by what follows
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from None


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    keys = key.strip().split(".")
    if not sign or not all(keys):
        raise ConfigError(f"override {override!r}: expected key=value, such as training.steps=100")
    place = values
    for depth, name in enumerate(keys[:-1]):
        # `model: some/folder` is a section that is written as its path.
        if depth == 0 and name == "model" and isinstance(place.get(name), str):
            place[name] = {"path": place[name]}
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, it has no keys")
    place[keys[-1]] = _parse(text, f"override {override!r}")


def _explain(problem: Any, values: Any) -> str:
    place = _place(problem, values)
    where = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        section, key = [part for part in place[:-1] if isinstance(part, str)], str(place[-1])
        return f"{where}: unknown key; {_nearest(section, key)}"
    if problem["type"] == "missing":
        return f"{where}: missing; it must be given"
    if problem["type"] == "model_type":
        found = "nothing; leave it out for its defaults" if problem["input"] is None else repr(problem["input"])
        return f"{where}: expected a section, that is keys with values, found {found}"
    if problem["type"] == "path_type":
        return f"{where}: expected a path, found {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "expected").replace("Input should", "it should")
    message = message.replace("valid tuple", "list").replace("Tuple should have", "expected a list of")
    found = "" if "found" in message or problem["type"] == "value_error" else f", found {problem['input']!r}"
    return f"{where}: {message}{found}"


def _place(problem: Any, values: Any) -> list[str | int]:
    """Where in the file a problem is: its path without the names of alternatives, which are no keys."""
    place: list[str | int] = []
    for part in problem["loc"]:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            continue
        place.append(part)
    return [*place, problem["loc"][-1]] if problem["type"] == "missing" else place


def _nearest(section: Sequence[str], key: str) -> str:
    """What was probably meant: a key of this section, else one of that name in another section."""
    prefix = "".join(f"{part}." for part in section)
    known = dict(_keys(RunConfig))
    here = [path.removeprefix(prefix) for path in known if path.startswith(prefix) and "." not in path[len(prefix) :]]
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        return f"did you mean {prefix}{close[0]}?"
    if elsewhere := [path for path in known if path.rpartition(".")[2] == key]:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(here)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in _sections_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return [annotation]
    return [inner for argument in typing.get_args(annotation) for inner in _sections_in(argument)]


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
