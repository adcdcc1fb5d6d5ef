"""The command line as a person uses it: train, stop, go on, look, and every kind of bad input.

Commands run in this process through the entry point itself, so that exit codes and both outputs are what a shell sees.
"""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tests.machine.profiles import profile
from tests.store.cases import segment

from weightstream.cli import main
from weightstream.commands import engines, run
from weightstream.config.config import load_config
from weightstream.errors import PlanError
from weightstream.store.store import Store
from weightstream.trace.spans import Span
from weightstream.units import json_text


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


class Shell:
    """Runs `weightstream …` in a folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["weightstream", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = self._capsys.readouterr()
        code = caught.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    def refused(self, *arguments: str) -> str:
        """Run what must be refused: exit code 2, one screen on stderr, nothing on stdout, nothing changed on disk."""
        before = self.state()
        result = self(*arguments)
        assert result.code == 2, result
        assert result.out == ""
        assert "Traceback" not in result.err
        assert len(result.err.splitlines()) < 24
        assert self.state() == before
        return result.err

    def state(self) -> dict[str, int]:
        """Sizes of all files but those that SQLite keeps beside a manifest which somebody reads."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path): path.stat().st_size for path in files if not path.name.endswith(("-shm", "-wal"))}


CONFIG = {
    "model": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "data": {"sources": ["text"], "tokenizer": {"size": 300}, "validation_share": 0.2},
    "optimizer": {"lr": 1e-2, "warmup": 1},
    "training": {
        "steps": 6, "micro_batches": 2, "micro_batch_size": 2, "sequence_length": 32, "tensorboard": False,
        "validation": {"every": 3, "sequences": 8}, "sample": {"prompts": ["def "], "tokens": 4},
    },
    "engine": {"device_memory": "16MiB", "host_memory": "64MiB"},
    "out": "run",
}  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    (tmp_path / "text").mkdir()
    for number in range(20):
        body = f"def function_{number}(argument):\n    return argument + {number}\n\n" * (4 + number % 5)
        (tmp_path / "text" / f"{number}.py").write_text(body)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr(engines, "DEFAULT_PATH", tmp_path / "profile.toml")  # of this machine, wherever it was measured
    return Shell(tmp_path, capsys, monkeypatch)


def test_fit_evaluate_generate_and_look(shell: Shell) -> None:
    fitted = shell("fit", "config.yaml", "--json")
    assert fitted.code == 0, fitted.err
    report = fitted.json()
    assert report["step"] == 6
    assert report["perplexity_after"] < report["perplexity_before"]
    assert report["moved_over_bound"] <= 1.02
    assert report["samples"][0]["prompt"] == "def "
    assert "step 1/6" in fitted.err

    evaluated = shell("evaluate", "run", "--json").json()
    assert evaluated["step"] == 6
    assert evaluated["loss"] == report["loss_after"]

    generated = shell("generate", "run", "def ", "return", "--tokens", "5", "--json").json()
    assert [sample["prompt"] for sample in generated["samples"]] == ["def ", "return"]
    assert generated["samples"][0]["continued"].startswith(report["samples"][0]["continued"])

    assert shell("store", "info", "run", "--json").json()["step"] == 6
    assert len(shell("store", "digest", "run/store").out.strip()) == 64
    verified = shell("store", "verify", "run")
    assert (verified.code, verified.out.strip()) == (0, "run/store: whole at step 6")

    traced = shell("trace", "diff", "run", "--json").json()
    assert traced == {key: value for key, value in report["trace"].items() if key != "text"}
    assert traced["steps"] >= 1
    on_compute = sum(row["measured"]["seconds"] for row in traced["rows"] if row["resource"] == "compute")
    assert 0.5 * traced["step_s"] < on_compute <= traced["step_s"]
    assert traced["predicted_s"] is None
    assert "no prediction was made" in shell("trace", "diff", "run").out
    exported = shell("trace", "export", "run", "--out", "perfetto.json", "--json").json()
    assert (exported["steps"], exported["ranks"]) == ([3, 6], 1)
    assert len(json.loads((shell.folder / "perfetto.json").read_text())["traceEvents"]) > 50
    assert shell("report", "run", "--json").json()["report"] == "run/report.html"
    assert "Timeline of step 6" in (shell.folder / "run" / "report.html").read_text()

    again = shell("fit", "config.yaml")
    assert again.code == 0
    assert shell("trace", "diff", "run", "--json").json() == traced  # there was no step to make
    assert "perplexity" in again.out
    assert "6 of 6 steps" in again.out


def test_what_has_no_trace_is_refused(shell: Shell) -> None:
    assert "no run at nowhere" in shell.refused("trace", "diff", "nowhere")
    assert "no run at nowhere" in shell.refused("report", "nowhere")
    assert "has no trace" in shell.refused("trace", "diff", "text")
    assert "has no trace" in shell.refused("trace", "export", "text")
    assert "is no run" in shell.refused("report", "text")


def test_the_prediction_of_a_run_is_kept_and_compared(shell: Shell) -> None:
    """Whoever can predict a run gives its spans; what it made of the same run last time would be right, on average."""
    from rich.console import Console

    from weightstream.commands.outcome import summary
    from weightstream.commands.run import Run, fit
    from weightstream.config.config import load_config
    from weightstream.trace.files import read_trace

    def predict(run: Run, say: Any) -> list[Span]:
        assert run.engine.step_count == 1
        return [Span(2, 0, "forward", "compute", "Forward(0)", 0.0, 0.25), Span(1, 0, "turn", "compute", "", 0.0, 9.0)]

    found = fit(load_config(Path("config.yaml"), ["training.steps=3"]), Console(quiet=True), predict=predict)
    assert found is not None
    assert found["trace"]["predicted_s"] == 0.25
    rows = {(row["kind"], row["resource"]): row for row in found["trace"]["rows"]}
    assert rows["forward", "compute"]["predicted"]["seconds"] == 0.25
    assert rows["backward", "compute"]["predicted"]["seconds"] == 0
    table = summary(found).partition("per step, on average of 1 step")[2]
    assert "predicted s" in table
    assert "0.2500" in table
    assert [span.what for span in read_trace(Path("run")).predicted] == ["Forward(0)"]


def test_snapshot_restore_branch_and_repair(shell: Shell) -> None:
    """Going back and training again ends where the first way ended; so does a branch; damage is undone."""
    assert shell("fit", "config.yaml", "training.steps=3", "optimizer.steps=6").code == 0
    assert shell("store", "snapshot", "run", "half", "--json").json() == {"snapshot": "half", "step": 3}
    assert shell("fit", "config.yaml", "optimizer.steps=6").code == 0
    whole = shell("store", "digest", "run").out

    lost = shell("store", "restore", "run", "half")
    assert (lost.code, "step 6) is held by no snapshot" in lost.err, "--discard" in lost.err) == (2, True, True)
    back = shell("store", "restore", "run", "half", "--discard", "--json").json()
    assert (back["step_before"], back["step"]) == (6, 3)
    assert shell("fit", "config.yaml", "optimizer.steps=6").code == 0
    assert shell("store", "digest", "run").out == whole

    assert shell("store", "branch", "run", "half", "other/store").code == 0
    assert shell("fit", "config.yaml", "optimizer.steps=6", "out=other").code == 0
    assert shell("store", "digest", "other").out == whole
    listed = shell("store", "snapshots", "run", "--json").json()
    assert listed["half"]["step"] == 3
    assert "half  step 3, alone " in shell("store", "snapshots", "run").out
    assert shell("store", "snapshots", "other").out.strip() == "no snapshots"

    with Store.open("run/store", writable=False) as store:
        path, part = segment(store, 1), store.layout(1).part("param")
    with path.open("r+b") as file:
        file.seek(part.offset + 8)
        file.write(b"damage!!")
    damaged = shell("store", "verify", "run")
    assert (damaged.code, "snapshot 'half' is whole" in damaged.out) == (1, True)
    repaired = shell("store", "verify", "run", "--repair", "--json")
    assert (repaired.code, repaired.json()["damage"]) == (0, [])
    assert "went back from step 6 to snapshot 'half' (step 3)" in repaired.json()["repaired"][0]
    freed = shell("store", "snapshot", "run", "half", "--delete", "--json").json()
    assert freed["freed_bytes"] == 0, "the last commit holds the same files"
    assert shell("fit", "config.yaml", "optimizer.steps=6").code == 0
    assert shell("store", "digest", "run").out == whole


def test_pieces_end_like_the_whole(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("fit", "config.yaml").code == 0
    whole = shell("store", "digest", "run").out

    from weightstream.training.loop import Trainer

    step = Trainer._step

    def interrupted(trainer: Trainer) -> Any:
        facts = step(trainer)
        if facts.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if facts.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return facts

    monkeypatch.setattr(Trainer, "_step", interrupted)
    first = shell("fit", "config.yaml", "out=pieces")
    assert first.code == 128 + signal.SIGINT
    assert "stopped at step 2; go on with: weightstream fit config.yaml out=pieces" in first.err
    second = shell("fit", "config.yaml", "out=pieces")
    assert second.code == 128 + signal.SIGTERM
    assert "going on from step 2 of 6" in second.err
    assert shell("fit", "config.yaml", "out=pieces").code == 0
    assert shell("store", "digest", "pieces").out == whole


def test_a_plan_creates_nothing(shell: Shell) -> None:
    before = shell.state()
    found = shell("plan", "config.yaml")
    assert found.code == 0, found.err
    assert "layers.1" in found.out
    assert "three versions" in found.out
    assert shell("plan", "config.yaml", "--json").json()["device_bytes"] <= 16 << 20
    assert shell.state() == before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.step=3"], "did you mean training.steps?"),
        (["training.steps=many"], "training.steps: expected a valid integer"),
        (["optimizer.name=adamm"], "optimizer.name: expected one of AdamW"),
        (["optimizer.settings={beta: 1}"], "optimizer AdamW"),
        (["optimizer.warmup=100"], "steps must be a whole number above warmup"),
        (["model.model_type=lama"], "transformers has no 'lama'; did you mean llama?"),
        (["model.hidden_sise=3"], "model.hidden_sise: unknown key of LlamaConfig; did you mean hidden_size?"),
        (["model.hidden_size=wide"], "LlamaConfig refuses these values"),
        (["model.hidden_size=0"], "llama cannot be built with these values: ZeroDivisionError"),
        (["engine.device=gpu"], "device: expected one that this PyTorch can use here"),
        (["engine.block_rules={'*': resident}"], "all of it is resident, by its block_rules"),
        (["out=config.yaml/run"], "config.yaml is a file, expected a folder"),
        (["model.architecture=LamaForCausalLM"], "did you mean LlamaForCausalLM?"),
        (["model={model_type: vit}"], "vit has no causal language model"),
        (["model=text"], "text has no config.json"),
        (["data.sources=[absent]"], "no text found in data.sources: 'absent'"),
        (["data.sources=[config.yaml]"], "config.yaml is the only one"),
        (["data.tokenizer.path=absent.json"], "no tokenizer at"),
        (["model.vocab_size=280"], "the model's vocabulary ends at 279"),
        (["training.micro_batch_size=10000"], "at least 20000 are needed"),
        (["training.sequence_length=100000"], "are needed"),
        (["sparsity.groups=[{patterns: ['*.mlp.*'], sparsity: 1.0}]"], "expected at least 0 and below 1; found 1.0"),
        (["sparsity.groups=[{patterns: ['*.gate.*']}]"], "matches no trainable matrix that an earlier group left"),
        (["sparsity.groups=[{patterns: ['*.mlp.*'], block: [32, 24]}]"], "give a block that does, or block: [1, 1]"),
        (["sparsity.groups=[{patterns: ['*.mlp.*'], init: text}]"], "cannot read masks from text"),
        (["engine.device_memory=1KiB"], "the smallest value that works is device_memory="),
        (["engine.host_memory=1KiB"], "the smallest value that works is host_memory="),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(shell: Shell, overrides: list[str], said: str) -> None:
    assert said in " ".join(shell.refused("fit", "config.yaml", *overrides).split())


def test_what_ranks_would_refuse_is_found_before_text_is_kept(shell: Shell) -> None:
    config = load_config(Path("config.yaml"), ["cluster.workers=2", "cluster.memory=100"])
    with pytest.raises(PlanError, match="but only 5 records to own"):
        run._try(config, rehearse=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.micro_batch_size=1000000000000"], "the logits of one micro-batch of 1000000000000 x 32 tokens"),
        (["training.sequence_length=2000000000"], "the logits of one micro-batch of 2 x 2000000000 tokens"),
        (["training.micro_batch=auto", "training.sequence_length=2000000000"], "of 1 x 2000000000 tokens"),
    ],
)
def test_a_plan_makes_no_micro_batch_that_cannot_fit(shell: Shell, overrides: list[str], said: str) -> None:
    assert said in shell.refused("plan", "config.yaml", *overrides)


def test_a_plan_asks_of_a_rank_what_it_has_to_do(shell: Shell) -> None:
    many = ("plan", "config.yaml", "training.micro_batches=256", "engine.device_memory=2MiB")
    assert "activations between blocks" in shell.refused(*many)
    assert shell(*many, "cluster.workers=4", "--json").json()["device_bytes"] <= 2 << 20


def test_a_run_makes_no_store_where_something_is(shell: Shell) -> None:
    (shell.folder / "run" / "store" / "letters").mkdir(parents=True)
    (shell.folder / "run" / "store" / "letters" / "thesis.txt").write_text("years of work")
    assert "found letters; give another path" in shell.refused("fit", "config.yaml")


def test_other_text_does_not_change_a_trained_run(shell: Shell) -> None:
    small = ("training.steps=2", "training.sample.prompts=[]")
    assert shell("fit", "config.yaml", *small).code == 0
    trained = shell("evaluate", "run", "--json").json()["loss"]
    (shell.folder / "other").mkdir()
    for number in range(4):
        (shell.folder / "other" / f"{number}.txt").write_text("quite other words, again and again\n" * (90 + number))
    note = (shell.folder / "run" / "data" / "prepared.json").read_bytes()
    assert "was trained so far with data" in shell.refused("fit", "run", *small, "data.sources=[other]")
    assert "was trained so far with data" in shell.refused("fit", "run", *small, "data.tokenizer.size=290")
    told = shell.refused("evaluate", "run", "data.sources=[other]")
    assert (shell.folder / "run" / "data" / "prepared.json").read_bytes() == note
    tokenizer = told.split()[-1]
    assert tokenizer.startswith("data.tokenizer.path=run/data/"), told
    elsewhere = shell("evaluate", "run", "data.sources=[other]", tokenizer, "--json")
    assert elsewhere.code == 0, elsewhere.err
    assert elsewhere.json()["loss"] != trained
    assert shell("store", "export", "run", "exported").code == 0  # with the run's tokenizer, not the last prepared one
    assert json.loads((shell.folder / "exported" / "config.json").read_text())["vocab_size"] == 300
    assert shell("evaluate", "run", "--json").json()["loss"] == trained


def test_a_snapshot_that_lost_a_file_can_be_given_up(shell: Shell) -> None:
    small = ("training.sample.prompts=[]", "optimizer.steps=6")
    assert shell("fit", "config.yaml", *small, "training.steps=2").code == 0
    assert shell("store", "snapshot", "run", "early").code == 0
    digest = shell("store", "digest", "run").out
    assert shell("fit", "config.yaml", *small, "training.steps=3").code == 0
    assert shell("store", "snapshot", "run", "late").code == 0
    with Store.open("run/store", writable=False) as store:
        segment(store, 1).unlink()
    assert "went back from step 3 to snapshot 'early'" in shell("store", "verify", "run", "--repair").out
    assert "late" in shell("store", "snapshots", "run").out
    assert shell("store", "snapshot", "run", "late", "--delete").code == 0
    verified = shell("store", "verify", "run")
    assert (verified.code, verified.out.strip()) == (0, "run/store: whole at step 2")
    assert shell("store", "digest", "run").out == digest


def test_json_has_numbers_that_every_parser_reads() -> None:
    assert json.loads(json_text({"a": [math.inf, 1.5], "b": {"c": math.nan}})) == {"a": [None, 1.5], "b": {"c": None}}


def test_a_run_beyond_its_last_step_says_so(shell: Shell) -> None:
    small = ("training.sample.prompts=[]", "optimizer.steps=6")
    assert shell("fit", "config.yaml", *small, "training.steps=2").code == 0
    again = shell("fit", "config.yaml", *small, "training.steps=1")
    assert "nothing to train: the store is at step 2, and training.steps is 1" in again.err
    assert again.out.startswith("2 of 2 steps")


def test_empty_text_is_refused(shell: Shell) -> None:
    for path in (shell.folder / "text").iterdir():
        path.write_text("")
    assert "is empty" in shell.refused("fit", "config.yaml")


def test_wrong_yaml_and_missing_files_are_refused(shell: Shell) -> None:
    (shell.folder / "broken.yaml").write_text("model: [")
    assert "is not YAML" in shell.refused("fit", "broken.yaml")
    assert "cannot read the configuration" in shell.refused("fit", "absent.yaml")
    assert "expected key=value" in shell.refused("fit", "config.yaml", "training.steps")
    assert "no store at run/store" in shell.refused("evaluate", "config.yaml")
    assert "absent" in shell.refused("store", "info", "absent")


def test_a_store_of_another_run_is_refused_with_both_values(shell: Shell) -> None:
    assert shell("fit", "config.yaml", "training.steps=2", "training.sample.prompts=[]").code == 0
    for override, said in (
        ("model.hidden_size=64", ("model",)),
        ("seed=5", ("seed", "0", "5")),
        ("engine.precision=fp32", ("bf16", "fp32")),
        ("optimizer.name=Lion", ("AdamW", "Lion")),
        ("training.sequence_length=16", ("sequence_length 32, found 16",)),
    ):
        message = shell.refused("fit", "config.yaml", override)
        assert all(part in message for part in said), message
    assert shell("fit", "config.yaml", "training.steps=3", "optimizer.lr=1e-3", "training.sample.prompts=[]").code == 0


def test_a_store_in_use_is_refused(shell: Shell) -> None:
    assert shell("fit", "config.yaml", "training.steps=2").code == 0
    from weightstream.store.store import Store

    with Store.open(shell.folder / "run" / "store"):
        assert "store" in shell.refused("fit", "config.yaml")
        assert shell("store", "info", "run").code == 0  # readers may look beside a writer


def test_differences_have_an_exit_code(shell: Shell) -> None:
    few = ("training.steps=2", "training.sample.prompts=[]")
    assert shell("fit", "config.yaml", *few).code == 0
    assert shell("fit", "config.yaml", *few, "out=other").code == 0
    same = shell("store", "diff", "run", "other/store")
    assert (same.code, same.err) == (0, "")
    assert same.out.startswith("equal: all ")
    assert shell("fit", "config.yaml", *few, "out=other", "training.steps=3").code == 0
    differ = shell("store", "diff", "run", "other")
    assert differ.code == 1
    assert "tensors differ" in differ.out.splitlines()[-1]
    assert any(line.startswith("lm_head.weight exp_avg: norm ") for line in differ.out.splitlines())
    found = shell("store", "diff", "run", "other", "--json")
    assert found.code == 1
    assert (found.json()["equal"], found.json()["b"]["step"]) == (False, 3)
    assert "absent" in shell.refused("store", "diff", "run", "absent")


def test_a_wiped_run_goes_on_from_what_was_pushed(shell: Shell) -> None:
    assert shell("fit", "config.yaml", "optimizer.steps=6", "out=whole").code == 0
    whole = shell("store", "digest", "whole").out
    assert shell("fit", "config.yaml", "optimizer.steps=6", "training.steps=3").code == 0
    assert shell("store", "push", "run", "target", "--json").json()["step"] == 3
    assert shell("store", "push", "run", "target", "--json").json()["sent_bytes"] == 0
    shutil.rmtree(shell.folder / "run")
    assert "already holds a store" in shell.refused("store", "pull", "target", "whole/store")
    assert "found nothing" in shell.refused("store", "pull", "absent", "run/store")
    pulled = shell("store", "pull", "target", "run/store")
    assert pulled.code == 0, pulled.err
    assert shell("store", "verify", "run").code == 0
    fitted = shell("fit", "config.yaml", "optimizer.steps=6")
    assert fitted.code == 0, fitted.err
    assert "going on from step 3 of 6" in fitted.err
    assert shell("store", "digest", "run").out == whole

    assert "give another target" in shell.refused("store", "push", "whole", "target")
    assert "expected a store" in shell.refused("store", "push", "text", "target")
    assert "Protocol not known" in shell.refused("store", "push", "run", "nowhere://x")
    shutil.rmtree(shell.folder / "run")
    (shell.folder / "target" / "segments" / "notes").mkdir()
    record = next(path for path in (shell.folder / "target" / "segments").iterdir() if path.is_file())
    record.write_bytes(record.read_bytes()[:-1] + b"x")
    damaged = shell("store", "pull", "target", "run/store")
    assert damaged.code == 2
    assert record.name in damaged.err
    assert not (shell.folder / "run" / "store" / "manifest.sqlite").exists()


def test_a_run_is_compared_with_its_prediction_and_is_the_same_without(shell: Shell) -> None:
    for name in ("alone", "foretold"):
        assert shell("fit", "config.yaml", f"out={name}").code == 0
        profile().save(shell.folder / "profile.toml")
    alone, foretold = (shell("store", "digest", name).out for name in ("alone", "foretold"))
    assert alone == foretold
    assert shell("trace", "diff", "alone", "--json").json()["predicted_s"] is None
    found = shell("trace", "diff", "foretold", "--json").json()
    assert found["predicted_s"] > 0
    rows = {(row["kind"], row["resource"]): row for row in found["rows"]}
    for kind in ("forward", "turn", "backward", "reduce"):
        measured, predicted = rows[kind, "compute"]["measured"], rows[kind, "compute"]["predicted"]
        assert predicted["count"] == measured["count"] > 0, kind
    # a look at the store takes updates out of their steps: never more than are predicted
    assert rows["update", "compute"]["predicted"]["count"] >= rows["update", "compute"]["measured"]["count"] > 0


def test_a_plan_predicts_where_the_machine_was_measured(shell: Shell) -> None:
    assert "run `weightstream calibrate` first" in shell("plan", "config.yaml").out
    profile().save(shell.folder / "profile.toml")
    found = shell("plan", "config.yaml")
    assert found.code == 0, found.err
    assert "is of another machine" in found.err
    assert " binds: compute " in found.out
    assert "blocks are fetched 2 ahead" in found.out
    assert "the disk holds a model like this of" in found.out
    assert "links per step" not in found.out
    told = shell("plan", "config.yaml", "--profile", "profile.toml", "cluster.workers=2", "--json").json()
    predicted, moved = told["predicted"], told["moved_per_step"]
    assert predicted["run_s"] > predicted["seconds_per_step"] > 0
    assert predicted["disk_s"] > 0 < predicted["link_s"]
    for way in ("disk_written", "down", "up"):
        assert moved[way]["bytes"] >= moved[way]["least_bytes"] > 0, way
    assert moved["disk_read"]["bytes"] == 0 < moved["ram_read"]["bytes"]  # all of it stays in RAM
    assert "links per step    down" in told["text"]
    (shell.folder / "profile.toml").write_text("format = ")
    refused = shell("plan", "config.yaml", "--profile", "profile.toml")
    assert refused.code == 2
    assert "is no TOML" in refused.err


AUTO = ("training.micro_batch=auto", "training.steps=2", "training.sample.prompts=[]", "training.micro_batches=4")


def test_the_micro_batch_is_chosen_once_and_stays(shell: Shell) -> None:
    planned = shell("plan", "config.yaml", *AUTO)
    assert "1 micro-batches of 8 sequences: the largest that fits" in planned.out, planned.err
    fitted = shell("fit", "config.yaml", *AUTO)
    assert fitted.code == 0, fitted.err
    assert "1 micro-batches of 8 sequences: the largest that fits" in fitted.err
    kept = yaml.safe_load((shell.folder / "run" / "config.yaml").read_text())["training"]
    assert (kept["micro_batch"], kept["micro_batches"], kept["micro_batch_size"]) == ("given", 1, 8)
    # another machine, where smaller ones would be chosen, with nothing but the store
    (shell.folder / "run" / "config.yaml").unlink()
    again = shell("fit", "config.yaml", *AUTO, "training.steps=3", "engine.reduction_groups=8", "cluster.workers=1")
    assert again.code == 0, again.err
    assert "1 micro-batches of 8 sequences, as the store's steps had" in again.err


def test_the_micro_batch_is_as_large_as_memory_and_workers_allow(shell: Shell) -> None:
    long = (*AUTO, "training.sequence_length=64", "training.micro_batches=16", "engine.activations=recompute")
    roomy = shell("plan", "config.yaml", *long, "--json").json()
    tight = shell("plan", "config.yaml", *long, "engine.device_memory=4MiB", "--json").json()
    assert (
        roomy["micro_batches"] * roomy["micro_batch_size"] == 32 == tight["micro_batches"] * tight["micro_batch_size"]
    )
    assert roomy["micro_batch_size"] > tight["micro_batch_size"]
    assert tight["device_bytes"] <= 4 << 20
    said = shell.refused("plan", "config.yaml", *long, "engine.device_memory=64KiB")
    assert "the smallest value that works is device_memory=" in said
    shared = shell("plan", "config.yaml", *long, "cluster.workers=4", "--json").json()
    assert shared["micro_batches"] >= 4
    assert "leave 2 of 4" in shell.refused(
        "plan", "config.yaml", *AUTO, "training.micro_batches=1", "cluster.workers=4"
    )


def test_the_micro_batch_is_the_fastest_by_prediction(shell: Shell) -> None:
    profile().save(shell.folder / "profile.toml")
    chosen = shell("plan", "config.yaml", *AUTO, "--json").json()
    assert "the fastest that fits" in chosen["text"]
    for size in (1, 2, 4, 8):
        division = (f"training.micro_batches={8 // size}", f"training.micro_batch_size={size}")
        found = shell("plan", "config.yaml", *AUTO, "training.micro_batch=given", *division, "--json").json()
        assert found["predicted"]["seconds_per_step"] >= chosen["predicted"]["seconds_per_step"]
