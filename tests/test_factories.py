"""Models that the configuration names by their code: the decoder with experts of `configs/experts.py`, end to end."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.machine.profiles import profile
from tests.test_cli import CONFIG, Shell
from tests.test_cli import shell as cli_shell
from torch import nn

from weightstream.commands.engines import engine_settings
from weightstream.config.architectures import architecture
from weightstream.config.config import ModelConfig, load_config
from weightstream.errors import ConfigError
from weightstream.nn import Pool
from weightstream.store.compaction import SHARE
from weightstream.store.store import Store
from weightstream.training.loop import Trainer
from weightstream.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"layers": 2, "width": 32, "heads": 2, "experts": 256**4, "expert_width": 8, "hashed_tokens": 2}

given_shell = cli_shell


@pytest.fixture
def shell(given_shell: Shell) -> Shell:
    """With a configuration whose model has 4 billion experts a layer."""
    config = CONFIG | {
        "model": {"factory": f"{CONFIGS / 'experts.py'}:Decoder", **SMALL},
        "training": CONFIG["training"] | {"validation": {"sequences": 4}},  # type: ignore[operator]
        "engine": {"device_memory": "16MiB", "host_memory": "32MiB", "experts_memory": "8MiB"},
    }
    (given_shell.folder / "config.yaml").write_text(yaml.safe_dump(config))
    return given_shell


def test_experts_are_trained_by_a_configuration_and_go_on_where_they_stopped(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(trainer: Trainer) -> Any:
        facts = step(trainer)
        if facts.step == 3 and trainer.engine.store.path == Path("pieces/store"):
            os.kill(os.getpid(), signal.SIGTERM)
        return facts

    monkeypatch.setattr(Trainer, "_step", interrupted)
    whole = shell("fit", "config.yaml", "--json")
    assert whole.code == 0, whole.err
    report = whole.json()
    assert report["perplexity_after"] < report["perplexity_before"]
    assert report["moved_over_bound"] < 2  # of small records headers are much
    facts = [line for line in read_metrics(Path("run/metrics.jsonl")) if line["kind"] == "experts"]
    assert [line["step"] for line in facts] == list(range(1, 7))
    assert 0 < facts[-1]["new"] < facts[-1]["touched"] <= 2 * 128

    profile().save(Path("profile.toml"))  # with a prediction, which changes nothing
    assert shell("fit", "config.yaml", "out=pieces").code == 128 + signal.SIGTERM
    assert shell("fit", "config.yaml", "out=pieces").code == 0
    assert shell("store", "digest", "pieces").out == shell("store", "digest", "run").out
    traced = shell("trace", "diff", "pieces", "--json").json()
    rows = {(row["kind"], row["resource"]): row for row in traced["rows"]}
    for place in (("load", "read"), ("write", "write")):
        measured, predicted = rows[place]["measured"]["bytes"], rows[place]["predicted"]["bytes"]
        assert 0.3 * measured < predicted < 2 * measured, place
    with Store.open("run/store", writable=False) as store:
        written = [store.count_written(range(first, first + family.count)) for first, family in store.layouts.families]
    assert sum(written) == sum(line["new"] for line in facts)

    # without a cache all tokens are given each time, and so what a hash of the last ones leads to is what it was trained on
    (sample,) = shell("generate", "run", "def ", "--tokens", "4", "--json").json()["samples"]
    assert sample == report["samples"][0]
    assert "is for models of transformers" in shell.refused("store", "export", "run", "exported")
    assert "is known by its code" in shell.refused("simulate", "config.yaml")


def test_a_plan_says_what_experts_need_and_creates_nothing(shell: Shell) -> None:
    before = shell.state()
    found = shell("plan", "config.yaml", "engine.experts_pool=100", "cluster.workers=2")
    assert found.code == 0, found.err
    assert "experts per step  at most 256," in found.out  # two layers, 128 tokens in each
    assert "experts pool      0 of 100 experts" in found.out
    assert shell.state() == before
    profile().save(Path("profile.toml"))
    told = shell("plan", "config.yaml", "cluster.workers=2", "--json").json()
    moved = told["experts_per_step"]
    assert moved["touched"] == pytest.approx(256, rel=1e-6)  # of 4 billion hardly two are the same
    assert (moved["new"], moved["seen"]) == (0, False)
    assert moved["written_bytes"] > moved["read_bytes"] > 256 * 12 * 2 * 32 * 8  # with a copy that streams, and pages
    assert told["predicted"]["run_written_bytes"] > 6 * moved["written_bytes"]
    # of two workers each draws half of them, of which the other one owns half
    assert moved["down_bytes"] == pytest.approx(128 * (8 + 2 * 2 * 32 * 8), rel=1e-3)
    assert moved["up_bytes"] == pytest.approx(128 * (3 * 8 + 4 * 2 * 32 * 8), rel=1e-3)
    assert "experts_memory" in shell.refused("fit", "config.yaml", "engine.experts_memory=1KiB")
    assert "may add" in shell.refused("fit", "config.yaml", "engine.experts_pool=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.factory=Decoder", "expected 'module:function' or 'file.py:function', found 'Decoder'"),
        ("model.factory=absent.py:Decoder", "no file absent.py in "),
        ("model.factory=weightstream.absent:Decoder", "module 'weightstream.absent' cannot be imported"),
        ("model.factory=broken.py:Decoder", "broken.py cannot be loaded: SyntaxError"),
        ("model.factory=text.py:build", "text.py has no function or class 'build'; did you mean built?"),
        ("model.factory=text.py:built", "text.py:built takes no vocab_size"),
        ("model.expert=3", "has no such argument; did you mean experts?"),
        ("model.model_type=llama", "expected factory alone, found model_type besides"),
        ("model.vocab_size=many", "expected a number of tokens, found 'many'"),
        ("model.vocab_size=280", "the model's vocabulary ends at 279"),
    ],
)
def test_what_is_no_model_is_refused(shell: Shell, override: str, said: str) -> None:
    (shell.folder / "text.py").write_text("def built(width):\n    return width\n")
    (shell.folder / "broken.py").write_text("def")
    assert said in shell.refused("fit", "config.yaml", override)


def test_a_factory_is_given_the_vocabulary_and_its_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def table(vocab_size, *, width):\n    return nn.Embedding(vocab_size, width)\n"
        "def number(**keys):\n    return len(keys)\n"
    )
    for keys, rows in (({"width": 3}, 300), ({"width": 3, "vocab_size": 7}, 7)):
        section = ModelConfig.model_validate({"factory": f"{tmp_path / 'mine.py'}:table", **keys})
        found, build = architecture(section, vocabulary=300, end_of_text=0)
        assert found.vocab_size == rows
        table = build()
        assert isinstance(table, nn.Embedding)
        assert table.weight.shape == (rows, 3)
    with pytest.raises(ConfigError, match=r"model\.width: missing; .*mine.py:table must be given width"):
        architecture(
            ModelConfig(factory=f"{tmp_path / 'mine.py'}:table"), vocabulary=300, end_of_text=0
        )  # fmt: skip
    _, build = architecture(ModelConfig(factory=f"{tmp_path / 'mine.py'}:number"), vocabulary=300, end_of_text=0)
    with pytest.raises(ConfigError, match=r"returned int, expected a torch\.nn\.Module"):
        build()
    section = ModelConfig.model_validate({"factory": "torch.nn:Embedding", "embedding_dim": 3})
    with pytest.raises(ConfigError, match="takes no vocab_size"):
        architecture(section, vocabulary=300, end_of_text=0)


def test_the_settings_of_experts_reach_the_engine(tmp_path: Path) -> None:
    path = CONFIGS / "experts.yaml"
    config = load_config(path)
    settings = engine_settings(config)
    assert settings["experts_memory"] == 768 << 20
    assert settings["experts_pool"] == {"*": Pool("2GiB", "existing")}
    assert settings["compaction_share"] == SHARE  # the configuration's default is the engine's
    assert engine_settings(load_config(path, ["engine.experts_pool=null"]))["experts_pool"] is None
    assert engine_settings(load_config(path, ["engine.experts_pool=1000"]))["experts_pool"] == {"*": Pool(1000)}
    by_layer = "engine.experts_pool=[{pattern: layers.0.*, limit: 5}, {limit: 1GiB}]"
    assert engine_settings(load_config(path, [by_layer]))["experts_pool"] == {"layers.0.*": Pool(5), "*": Pool("1GiB")}
    (tmp_path / "config.yaml").write_text(load_config(path, [by_layer]).to_yaml())
    assert load_config(tmp_path) == load_config(path, [by_layer])
    for wrong, said in (
        ("engine.experts_pool=0", "expected a number of experts, or bytes as text"),
        ("engine.experts_pool=lots", "expected a quantity of bytes"),
        ("engine.experts_pool={limt: 5}", "did you mean engine.experts_pool.limit?"),
        ("engine.experts_pool=[{limit: 5}, {limit: 6}]", "found '*' more than once"),
        ("engine.compaction_share=2", "less than or equal to 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(path, [wrong])
        assert said in str(caught.value)
