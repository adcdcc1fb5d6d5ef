"""Configuration: what is accepted, how overrides are typed, and what a person is told when something is wrong."""

from pathlib import Path

import pytest

from weightstream.commands.engines import engine_settings
from weightstream.config.config import RunConfig, check_config, load_config
from weightstream.errors import ConfigError
from weightstream.store.optimizers import AdamW, Optimizer, Torch

TEXT = """
model: {model_type: llama, hidden_size: 64, initializer_range: 2e-2}
training: {steps: 10}
engine: {device_memory: 64MiB}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) < 24, "more than one screen"
    return message


def test_values_defaults_and_overrides(file: Path) -> None:
    config = load_config(
        file, ["training.steps=3", "optimizer.lr=3e-4", "data.sources=[a, b]", "model.use_cache=false"]
    )
    assert config.training.steps == 3
    assert config.optimizer.lr == 3e-4
    assert config.data.sources == ("a", "b")
    assert config.engine.device_memory == 64 << 20
    assert config.model.settings == {"hidden_size": 64, "initializer_range": 0.02, "use_cache": False}
    assert config.training.clip_norm == 1.0


def test_a_written_configuration_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optimizer.groups=[{pattern: '*.bias', lr_scale: 2}]", "training.clip_norm=null"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path) == config


def test_configurations_are_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(file).training.steps = 5  # type: ignore[misc]


def test_a_folder_is_a_model(file: Path) -> None:
    assert load_config(file, ["model=some/folder"]).model.path == Path("some/folder")
    file.write_text("model: some/folder")
    assert load_config(file, ["model.weights=false"]).model.weights is False


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.step=1", "training.step: unknown key; did you mean training.steps?"),
        ("trainig.steps=1", "trainig: unknown key; did you mean training?"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr?"),
        ("training.validation.evry=1", "did you mean training.validation.every?"),
        ("engine.zzz=1", "known here: device, device_memory"),
        ("optimizer.groups=[{patern: x}]", "did you mean optimizer.groups.pattern?"),
    ],
)
def test_unknown_keys_name_the_nearest(file: Path, override: str, said: str) -> None:
    assert said in refusal(file, override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.steps=many", "training.steps: expected a valid integer"),
        ("training.steps=0", "training.steps: expected greater than or equal to 1, found 0"),
        ("optimizer.lr=-1", "optimizer.lr: expected greater than 0, found -1"),
        ("engine.precision=fp16", "engine.precision: expected 'fp32' or 'bf16', found 'fp16'"),
        ("engine.device_memory=lots", "engine.device_memory: expected a quantity of bytes such as '512MiB'"),
        ("data.sources=[]", "data.sources: expected a list of at least 1 item"),
        ("data.sources=stdlib", "data.sources: expected a list, found 'stdlib'"),
        ("training=3", "training: expected a section, that is keys with values, found 3"),
        ("training=", "training: expected a section, that is keys with values, found nothing; leave it out"),
        ("out=3", "out: expected a path, found 3"),
        ("training.clip_norm=.inf", "training.clip_norm: expected a finite number, found inf"),
        ("cluster.timeout_s=.inf", "cluster.timeout_s: expected a finite number, found inf"),
        ("cluster.timeout_s=1e300", "cluster.timeout_s: expected less than or equal to 1000000"),
        ("training.micro_batches=1000000000", "training.micro_batches: expected less than or equal to 1048576"),
        ("engine.reduction_groups=100000000", "engine.reduction_groups: expected less than or equal to 65536"),
        ("sparsity.kernels=fast", "sparsity.kernels: expected 'auto', found 'fast'"),
        ("sparsity.groups=[{patterns: [x], sparsity: {schedul: cubic}}]", "mean sparsity.groups.sparsity.schedule?"),
        ("engine.experts_pool=-1", "engine.experts_pool: expected a number of experts"),
    ],
)
def test_wrong_values_say_what_was_expected(file: Path, override: str, said: str) -> None:
    assert said in refusal(file, override)


def test_all_problems_are_told_at_once(file: Path) -> None:
    message = refusal(file, "training.steps=x", "engine.prefech=1")
    assert "2 problem(s)" in message
    assert "training.steps" in message
    assert "engine.prefetch?" in message


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3"])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    assert "expected key=value" in refusal(file, override)


def test_an_override_below_a_value_is_refused(file: Path) -> None:
    assert "training.steps is a value, it has no keys" in refusal(file, "training.steps.x=3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "is not YAML"),
        ("- a\n- b", "expected sections such as model:"),
        ("", "model: missing"),
        ("model: {hidden_size: 3}", "expected path, model_type or architecture"),
        ("model: x\nseed: 1\nseed: 2", "'seed' is given twice"),
        ("? [a, b]\n: 1", "found unhashable key"),
        ("model: " + "[" * 3000 + "]" * 3000, "is not YAML"),
    ],
)
def test_wrong_yaml_is_refused(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    assert said in refusal(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot read the configuration" in refusal(tmp_path / "absent.yaml")
    assert "cannot read the configuration" in refusal(tmp_path)


def _config(**optimizer: object) -> RunConfig:
    return check_config({"model": {"model_type": "llama"}, "optimizer": optimizer}, source="test")


def test_optimizers_are_made_by_name() -> None:
    adamw = Optimizer.from_json(_config(lr=1e-3, warmup=5, settings={"betas": [0.9, 0.95]}).optimizer.to_json(100))
    assert isinstance(adamw, AdamW)
    assert adamw.betas == (0.9, 0.95)
    assert adamw.lr_at(5) == 1e-3
    assert adamw.lr_at(100) == pytest.approx(0)
    nadam = Optimizer.from_json(_config(name="torch.NAdam", schedule="constant", weight_decay=0.0).optimizer.to_json(9))
    assert isinstance(nadam, Torch)
    for name in ("sgd", "Lion", "adafactor"):
        assert (
            type(Optimizer.from_json(_config(name=name, schedule="wsd").optimizer.to_json(9))).__name__.lower()
            == name.lower()
        )


def test_unknown_optimizers_and_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer.name: expected one of AdamW, SGD"):
        _config(name="adamm").optimizer.to_json(10)
    with pytest.raises(ConfigError, match="beta"):
        Optimizer.from_json(_config(settings={"beta": 1}).optimizer.to_json(10))


def test_sparsity_reaches_the_engine(file: Path) -> None:
    settings = engine_settings(load_config(Path(__file__).parents[1] / "configs" / "sparse-60m.yaml"))
    (group,) = settings["sparsity"].groups
    assert (group.algorithm, group.sparsity, group.every, group.end) == ("rigl", 0.9, 5, 52)
    assert engine_settings(load_config(file))["sparsity"].groups == ()
    overrides = ["sparsity.groups=[{patterns: ['*.mlp.*'], algorithm: set}]", "sparsity.kernels={'*.mlp.*': gathered}"]
    settings = engine_settings(load_config(file, overrides))
    assert settings["sparsity"].groups[0].end == 7  # three quarters of 10 steps
    assert settings["kernels"] == {"*.mlp.*": "gathered"}
    assert engine_settings(load_config(file, ["sparsity.kernels=auto"]))["kernels"].tokens == 4 * 512
