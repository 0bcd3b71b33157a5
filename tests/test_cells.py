"""Keys, freshness, resume, failures and bad input, through the real command line on tiny cells."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch

from distillbench import config
from distillbench.cells import journal
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import write_tensors
from distillbench.cells.record import describe, finish
from distillbench.cli.evaluate import known_metrics
from distillbench.errors import UserError
from distillbench.registry import code, folders, source
from distillbench.tables import contents
from eval.metrics import key
from eval.report import records
from tests.conftest import BIN, ROOT, Checkout


def cell(benchmark: str = "tiny-ring", arm: str | None = "meanflow", seed: int = 0) -> Cell:
    return Cell(config.benchmark(benchmark), None if arm is None else folders.arm(arm), seed)


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_key_follows_everything_that_determines_the_result(checkout: Checkout):
    before = cell().key
    assert cell().key == before
    assert cell(seed=1).key != before
    assert cell(arm="meanflow@scratch").key != before
    for path, old, new in (
        ("methods/meanflow/method.py", "if m < n", "if m <= n"),
        ("methods/meanflow/config.yaml", "time_std: 2.0", "time_std: 2.1"),
        ("workflows/benchmarks/tiny-ring.yaml", "updates: 60", "updates: 61"),
        ("workflows/benchmarks/tiny-ring.yaml", "flops: 7.0e+9", "flops: 7.1e+9"),
        ("workflows/benchmarks/tiny-ring.yaml", "[1, 2, 3]", "[1, 2, 4]"),
    ):
        edit(checkout.folder / path, old, new)
        assert cell().key != before, path
        edit(checkout.folder / path, new, old)
        assert cell().key == before, "reverting an edit finds the old cell again"
    edit(checkout.folder / "methods/meanflow/config.yaml", "title: MeanFlow", "title: Mean flow")
    edit(
        checkout.folder / "workflows/benchmarks/tiny-ring.yaml",
        "timeout_s: 3600",
        "timeout_s: 61\nstall_s: 62",
    )
    assert cell().key == before, "a title or a time limit determines no result"


def modules(*folders: str) -> set[str]:
    """Dotted names of the modules in these folders of the package, '' for its own."""
    return {
        ".".join(("distillbench", *path.relative_to(code.PACKAGE).with_suffix("").parts))
        for folder in folders
        for path in (code.PACKAGE / folder).glob("*.py")
        if path.stem != "__init__"
    }


def closure(*places: str) -> set[str]:
    """Modules whose code is in the hash of these files of the package."""
    found: set[str] = set()
    todo = [code.PACKAGE / place for place in places]
    while todo:
        for _, name in source.imports(todo.pop()):
            for module in (name, name.rpartition(".")[0]):
                if module not in found and (file := code.followed_by_runner(module)) is not None:
                    found.add(module)
                    todo.append(file)
    return found


def test_every_module_that_computes_is_in_the_key():
    """A new module at the desk, of networks, data or teachers is followed, or stands here."""
    of_kinds = {
        f"distillbench.{file.removesuffix('.py').replace('/', '.')}" for file in code.OF_ALL_KINDS
    }
    others = {f"distillbench.{name}" for name in ("config", "errors", "hashing", "reading")}
    computing = modules("", "networks", "data", "teachers") - others
    assert {name for name in computing if code.followed(name) is None} == set()
    assert not [name for name in others if code.followed(name)]
    assert not [name for name in of_kinds if code.followed_by_runner(name)]
    in_cells = {name for name in modules("cells") if code.followed(name)}
    assert in_cells == {
        f"distillbench.cells.{name}" for name in ("build", "loop", "sampling", "setup", "steps")
    }
    rest = modules("registry", "audits", "cluster", "tables", "conformance", "cli")
    assert not [name for name in rest if code.followed(name)]


def test_what_a_cell_runs_is_reached_from_its_runner_or_its_method():
    """Of the modules that compute, all but those that only methods import and one network."""
    runner = closure(*code.RUNNER)
    methods = {
        name
        for path in (Path(ROOT) / "methods").glob("*/method.py")
        for _, full in source.imports(path)
        for name in (full, full.rpartition(".")[0])
        if code.followed(name)
    }
    reached = (
        runner
        | methods
        | closure(*(f"{m.partition('.')[2].replace('.', '/')}.py" for m in methods))
    )
    computing = {
        name
        for name in modules("", "networks", "data", "teachers")
        if code.followed_by_runner(name)
    }
    assert computing - reached == {"distillbench.networks.dit"}  # no benchmark uses it yet
    assert {"distillbench.players", "distillbench.networks.mlp", "distillbench.paths"} <= runner
    assert "distillbench.adversarial" not in runner and "distillbench.adversarial" in methods


def test_a_fresh_cell_is_not_trained_again(checkout: Checkout):
    assert (
        checkout.run("distillbench", "train", "tiny-ring", "meanflow", "--seeds", "0").returncode
        == 0
    )
    stamp = cell().record.stat().st_mtime_ns
    again = checkout.run("distillbench", "train", "tiny-ring", "meanflow", "--seeds", "0")
    assert again.returncode == 0 and again.stderr == ""
    assert cell().record.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("arm", ["meanflow", "dmd"])
def test_killed_and_resumed_equals_uninterrupted(checkout: Checkout, arm: str):
    """After kill -9 in training the same command continues from a checkpoint to the same bytes."""
    edit(checkout.folder / "workflows/benchmarks/tiny-ring.yaml", "flops: 7.0e+9", "flops: 1.5e+10")
    command = ("distillbench", "train", "tiny-ring", arm, "--seeds", "0")
    done = checkout.run(*command)
    assert done.returncode == 0, done.stderr
    names = ("student.safetensors", "samples.safetensors")
    folder = cell(arm=arm).folder
    expected = [(folder / n).read_bytes() for n in names]
    steps = [line for line in journal.read(folder) if "step" in line]
    shutil.rmtree(folder)

    process = checkout.start(*command)
    while not (folder / "checkpoint.safetensors").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()
    assert checkout.run(*command).returncode == 0
    assert [(folder / n).read_bytes() for n in names] == expected
    again = {line["step"]: line for line in journal.read(folder) if "step" in line}
    assert list(again.values()) == steps
    # The comparison can fail: another seed gives other bytes.
    assert checkout.run(*command[:-1], "1").returncode == 0
    assert (cell(arm=arm, seed=1).folder / names[0]).read_bytes() != expected[0]


BROKEN = {
    "noimport": (
        "import torch\n",
        "import torch\nimport a_module_nobody_has\n",
        "failed",
        "a_module_nobody_has",
    ),
    "raises": (
        "        c = self.config\n",
        "        assert step.index != 7, 'step seven'\n        c = self.config\n",
        "failed",
        "step seven",
    ),
    "nan": (
        'return logged | {"critic": fake.detach()}',
        'return {"critic": fake.detach() / 0}',
        "diverged",
        "critic is inf",
    ),
    "shape": (
        "return self.generate(self.student.averaged(), noise, cond.labels)",
        "return self.generate(self.student.averaged(), noise, cond.labels)[:, :1]",
        "failed",
        "expected",
    ),
    "greedy": (
        "return self.generate(self.student.averaged(), noise, cond.labels)",
        "return self.generate(self.student.averaged(), "
        "self.generate(self.student.averaged(), noise, cond.labels), cond.labels)",
        "failed",
        "2 network evaluations at nfe=1",
    ),
    "exits": (
        "        c = self.config\n",
        "        raise SystemExit(0)\n        c = self.config\n",
        "failed",
        "SystemExit",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_method_costs_its_own_row(checkout: Checkout, name: str):
    old, new, status, reason = BROKEN[name]
    shutil.copytree(checkout.folder / "methods/dmd", checkout.folder / f"methods/{name}")
    edit(checkout.folder / f"methods/{name}/method.py", old, new)
    done = checkout.run("distillbench", "train", "tiny-ring", name, "--seeds", "0")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    record = json.loads(cell(arm=name).record.read_text())
    assert record["status"] == status and reason in record["reason"]


BAD = [
    (["train", "tinny", "dmd"], "unknown benchmark 'tinny', did you mean 'tiny'?"),
    (["train", "tiny", "dmb"], "unknown method 'dmb', did you mean 'dmd'?"),
    (
        ["train", "tiny", "dmd@no-regresion"],
        "unknown variant 'no-regresion', did you mean 'no-regression'?",
    ),
    (["train", "tiny", "dmd", "--seeds", "0;1"], "--seeds: '0;1' is not a comma-separated list"),
    (["plan", "tabl"], "unknown table 'tabl'"),
    (["sample", "tiny", "dmd", "--output", "x.jpg"], "must end in .png or .safetensors"),
    (["evaluate", "tiny", "dmd"], "is not trained: run `distillbench train tiny dmd --seeds 0`"),
]


@pytest.mark.parametrize("arguments,message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_a_mistyped_command_is_one_line_and_exit_code_2(
    checkout: Checkout, arguments: list[str], message: str
):
    done = checkout.run("distillbench", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (checkout.folder / "results").exists(), "nothing was started"


FILES = [
    (
        "workflows/benchmarks/tiny.yaml",
        "budget:",
        "budjet:",
        "unknown key 'budjet', did you mean 'budget'?",
    ),
    (
        "workflows/benchmarks/tiny.yaml",
        "width: 32",
        "widht: 32",
        "unknown key 'network.widht', did you mean 'width'?",
    ),
    ("workflows/benchmarks/tiny.yaml", "name: tiny", "name: [", "not valid YAML"),
    (
        "workflows/tables/tiny.yaml",
        "benchmarks: [tiny]",
        "benchmarks: [tyny]",
        "unknown benchmark 'tyny', did you mean 'tiny'?",
    ),
    (
        "workflows/tables/tiny.yaml",
        "title: tiny",
        "title: tiny, methods: [dnd]",
        "unknown method 'dnd', did you mean 'dmd'?",
    ),
    (
        "methods/dmd/config.yaml",
        "pair_batch: 64",
        "pair_bach: 64",
        "unknown key 'pair_bach', did you mean 'pair_batch'?",
    ),
    ("methods/dmd/config.yaml", "student: {lr: 2.0e-3", "student: {lr: -2.0e-3", "student.lr"),
    ("methods/dmd/config.yaml", "fidelity: paper text", "fidelity: perfect", "fidelity"),
    (
        "distillbench.yaml",
        "method_paths: []",
        "method_paths: [nowhere]",
        "no method.py in 'nowhere'",
    ),
    (
        "distillbench.yaml",
        "method_paths: []",
        "methods: []",
        "unknown key 'methods', did you mean 'method_paths'?",
    ),
]


def test_a_file_that_is_a_folder_is_named(checkout: Checkout):
    path = checkout.folder / "methods/dmd/config.yaml"
    path.unlink()
    path.mkdir()
    done = checkout.run("distillbench", "list")
    assert done.returncode == 2
    assert done.stderr.startswith(f"distillbench: {path}: cannot be read (Is a directory)")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("path,old,new,message", FILES, ids=[f"{p}: {n}" for p, _, n, _ in FILES])
def test_a_mistake_in_a_file_is_one_line_before_any_work(
    checkout: Checkout, path: str, old: str, new: str, message: str
):
    edit(checkout.folder / path, old, new)
    done = checkout.run("distillbench", "plan", "tiny")
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_the_workflow_refuses_a_mistake_before_any_work(checkout: Checkout):
    edit(checkout.folder / "methods/dmd/config.yaml", "pair_batch: 64", "pair_bach: 64")
    done = checkout.snakemake("results/tiny.md")
    assert (
        done.returncode == 2
        and "did you mean 'pair_batch'?" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not (checkout.folder / "results/runs").exists()


def fake(benchmark: str, metrics: str | None = None) -> list[Cell]:
    """Every cell of the table `benchmark`, recorded as done, with this metrics.json if given."""
    cells = [c for job in contents.jobs(config.table(benchmark), known_metrics) for c in job.cells]
    for one in cells:
        one.folder.mkdir(parents=True)
        finish(one, describe(one), {"steps": 1, "flops": 1.0}, 1, None)
        if metrics is not None:
            one.metrics.write_text(metrics)
    return cells


@pytest.mark.parametrize(
    "metrics", [None, '{"evaluation": {"key": "an older one"}, "rows": []}', '{"evalu']
)
def test_a_cell_that_this_evaluation_has_not_seen_is_not_published(
    checkout: Checkout, metrics: str | None
):
    fake("tiny-ring", metrics)
    done = checkout.run("distillbench", "table", "tiny-ring")
    assert done.returncode == 2 and not (checkout.folder / "results/records").exists()
    assert done.stderr.startswith("distillbench: tiny-ring/teacher seed 0 is not evaluated")
    assert "`snakemake --cores all results/tiny-ring.md`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_damaged_record_is_named_by_every_command(checkout: Checkout):
    first = fake("tiny-ring")[0]
    record = first.record
    for text in ("", "null", "{}", '{"status": "do'):
        record.write_text(text)
        with pytest.raises(UserError, match=f"^{re.escape(str(record))}: "):
            first.result()
        first.metrics.write_text(text)
        assert not key.is_evaluated(first.metrics)
    names = (
        ("status", "tiny-ring"),
        ("plan", "tiny-ring"),
        ("table", "tiny-ring"),
        ("train", "tiny-ring", "teacher"),
    )
    for command in (*names, ("evaluate", "tiny-ring", "teacher"), ("logs", str(record.parent))):
        if command[0] == "logs":
            record.with_name("lock").touch()
        done = checkout.run("distillbench", *command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"distillbench: {record}: not valid JSON of a record")
        assert done.stderr.count("\n") == 1


def test_records_are_replaced_whole_or_not_at_all(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
):
    """A full disk or a kill in any of its steps, and what a killed process left behind."""
    metrics = json.dumps({"evaluation": {"key": key.evaluation_key(None, None)}, "rows": []})
    cells = [(c.folder, {"title": "old"}) for c in fake("tiny-ring", metrics)]
    folder = checkout.folder / "results/records/tiny-ring"
    assert records.publish(folder, cells, False) == (0, len(cells))
    assert records.publish(folder, cells, False) == (len(cells), len(cells))
    one = cells[0][0] / "metrics.json"
    for change, same in (({"key": "of other code"}, 0), ({"rows": [{"nfe": 1}]}, 1)):
        one.write_text(json.dumps(json.loads(metrics) | change))
        assert records.publish(folder, cells, False) == (len(cells) - same, len(cells))
    one.write_text(metrics)
    records.publish(folder, cells, False)

    def titles() -> set[str]:
        assert [p.name for p in folder.parent.iterdir()] == ["tiny-ring"]
        return {r.result["title"] for r in records.read(folder)}

    renamed = [(c, {"title": "new"}) for c, _ in cells]
    for name, stop, raised in (
        ("rename", OSError(28, "No space left on device"), ValueError),
        ("rename", KeyboardInterrupt(), KeyboardInterrupt),
        ("mkdir", OSError(30, "Read-only file system"), ValueError),
        ("write_text", OSError(122, "Disk quota exceeded"), ValueError),
    ):
        original, calls = getattr(Path, name), []

        def failing(self: Path, *args, original=original, calls=calls, stop=stop, **kwargs):
            calls.append(self)
            if len(calls) == 2:  # of the renames the one that brings the new records
                raise stop
            return original(self, *args, **kwargs)

        with monkeypatch.context() as m:
            m.setattr(Path, name, failing)
            with pytest.raises(raised) as error:
                records.publish(folder, renamed, False)
        assert titles() == {"old"} and (
            raised is not ValueError or "cannot be written (" in str(error.value)
        )
    folder.rename(folder.with_name(".tiny-ring.old"))  # killed between the two renames
    folder.with_name(".tiny-ring.new").mkdir()
    assert records.publish(folder, renamed, False) == (len(cells), len(cells)) and titles() == {
        "new"
    }

    damaged = next(folder.rglob("metrics.json"))
    damaged.write_text("{")
    done = checkout.run("distillbench", "table", "tiny-ring", "--render")
    assert done.returncode == 2 and done.stderr.startswith(
        f"distillbench: {damaged}: not valid JSON: "
    )


def test_a_foreign_checkpoint_is_named(checkout: Checkout):
    """Damaged ones: tests/test_resilience.py."""
    command = ("distillbench", "train", "tiny-ring", "dmd", "--seeds", "0")
    assert checkout.run(*command).returncode == 0
    made, checkpoint = cell(arm="dmd"), cell(arm="dmd").folder / "checkpoint.safetensors"
    made.record.unlink()
    write_tensors(checkpoint, {"x": torch.zeros(1)}, key="another", step=3)
    done = checkout.run(*command)
    assert (
        done.returncode == 2
        and "checkpoint of another cell" in done.stderr
        and "delete it" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1
    checkpoint.unlink()
    assert checkout.run(*command).returncode == 0


def test_a_results_folder_that_takes_no_more_is_named(checkout: Checkout):
    """Every error of the file system, for which a file in place of the folder stands.

    Permissions would not do, since tests may run as root.
    """
    (checkout.folder / "results").mkdir()
    (checkout.folder / "results/runs").write_text("in the way")
    done = checkout.run("distillbench", "train", "tiny-ring", "dmd", "--seeds", "0")
    assert (
        done.returncode == 2
        and "cannot write there" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_results_folder_is_named(checkout: Checkout):
    results = checkout.folder / "results"
    results.mkdir()
    results.chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = checkout.run("distillbench", "train", "tiny-ring", "dmd", "--seeds", "0")
    results.chmod(stat.S_IRWXU)
    assert done.returncode == 2 and "cannot write there" in done.stderr


def test_a_full_disk_loses_nothing(checkout: Checkout):
    """A write that fails leaves no half file, and the same command then finishes.

    A limit on the size of files stands for the full disk.
    """
    limited = f"trap '' XFSZ; ulimit -f 8; exec {BIN}/distillbench train tiny-ring dmd --seeds 0"
    done = checkout.run_anew("bash", "-c", limited)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list((checkout.folder / "results").rglob(".*.safetensors*"))
    assert checkout.run("distillbench", "train", "tiny-ring", "dmd", "--seeds", "0").returncode == 0


def test_interrupt_says_how_to_continue(checkout: Checkout):
    edit(checkout.folder / "workflows/benchmarks/tiny-ring.yaml", "updates: 60", "updates: 100000")
    process = checkout.start("distillbench", "train", "tiny-ring", "teacher", "--seeds", "0")
    while not (cell(arm=None).folder / "config.yaml").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (
        process.returncode == 130
        and "the same command continues" in errors
        and "Traceback" not in errors
    )
