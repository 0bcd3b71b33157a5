"""`distillbench new` and `check`: the template keeps the contract, and no broken copy passes.

Every broken copy is caught for its own fault.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distillbench.cli.evaluate import known_metrics
from distillbench.cli.new import write_folder
from distillbench.conformance import check
from distillbench.conformance.check import Check
from distillbench.errors import UserError
from distillbench.registry import folders
from eval.metrics.mixtures import sliced_wasserstein
from tests.conftest import ROOT, Checkout
from tests.test_cells import edit

STEP = """        loss = regression_loss(self.generate(self.net, z, cond.labels), y)
"""
LOSS = "    return (x - y).square().mean()\n"
SAMPLE = "        return self.generate(self.student.averaged(), noise, cond.labels)\n"
NETWORK = '        self.net = task.network("teacher")\n'
IMPORT = "import torch\nfrom pydantic"
BROKEN: dict[str, tuple[list[tuple[str, str]], str]] = {
    "unmetered": (
        [
            (
                NETWORK,
                NETWORK + "        self.extra = torch.nn.Linear(self.net.shape[-1] ** 2, 300)\n",
            ),
            (
                STEP,
                STEP
                + "        if z.shape[-1] == 4:\n"
                + "            loss = loss + 0 * self.extra(z[:, 0, :4, :4].flatten(1)).sum()\n",
            ),
        ],
        "expected every network to be of task.network or in a task.player",
    ),
    "global_rng": (
        [(STEP, "        z = z + 1e-3 * torch.randn_like(z)\n" + STEP)],
        "saw draws from a global stream",
    ),
    "forgotten_state": (
        [
            (NETWORK, NETWORK + "        self.scale = torch.ones(())\n"),
            (
                STEP,
                STEP
                + "        self.scale = 0.9 * self.scale + 0.1 * loss.detach()\n"
                + "        loss = loss * (1 + self.scale)\n",
            ),
        ],
        "after a resume at 100",
    ),
    "wrong_nfe": (
        [
            (
                SAMPLE,
                "        x = self.generate(self.student.averaged(), noise, cond.labels)\n"
                + SAMPLE.replace("noise", "noise + 0 * x"),
            )
        ],
        "sample made 2 network evaluations at nfe=1",
    ),
    "reads_reference": (
        [
            (IMPORT, "import torch\nfrom sklearn.datasets import load_digits\nfrom pydantic"),
            (
                NETWORK,
                NETWORK + "        self.reference = torch.from_numpy(load_digits().images)\n",
            ),
        ],
        "digits.csv.gz",
    ),
    "changes_teacher": (
        [
            (
                STEP,
                STEP
                + "        with torch.no_grad():\n"
                + "            [p.mul_(1.001) for p in self.task.teacher.network.parameters()]\n",
            )
        ],
        "saw other weights after a cycle on check-digits",
    ),
    "wrong_sign": (
        [(LOSS, "    return -(x - y).square().clamp(max=9).mean()\n")],
        "expected progress towards the teacher; saw sliced W2",
    ),
    "over_budget": (
        [
            (
                STEP,
                STEP
                + "        if step.index % 3 == 2:\n"
                + "            self.generate(self.net, z, cond.labels)\n",
            )
        ],
        "times that over 200 steps",
    ),
    "hidden_compute": (
        [
            (
                SAMPLE,
                "        net = self.student.averaged()\n"
                "        net.forward(noise, noise.new_ones(len(noise)), cond.labels)\n" + SAMPLE,
            )
        ],
        "saw 50% of the FLOPs elsewhere",
    ),
    "late_cost": (
        [
            (
                STEP,
                STEP
                + "        if step.index >= 200:\n"
                + "            self.generate(self.net, z, cond.labels)\n",
            )
        ],
        "times that at step",
    ),
    "late_state": (
        [
            (NETWORK, NETWORK + "        self.scale = 1.0\n"),
            (
                STEP,
                STEP
                + "        self.scale += 0.1 * (step.index % 50 == 49)\n"
                + "        loss = loss * self.scale\n",
            ),
        ],
        "after a resume at 100",
    ),
    "remembers_a_file": (
        [
            (IMPORT, "import functools\nimport torch\nfrom pydantic"),
            (
                "def regression_loss",
                "@functools.cache\n"
                "def secret():\n"
                "    return open('/etc/hostname').read()\n\n\n"
                "def regression_loss",
            ),
            (NETWORK, NETWORK + "        secret()\n"),
        ],
        "saw /etc/hostname",
    ),
    "nan": (
        [(STEP, STEP + "        loss = loss / (0 if step.index == 150 else 1)\n")],
        "Diverged: student: loss is inf at update 150, step 150",
    ),
    "wrong_shape": (
        [(SAMPLE, SAMPLE.rstrip() + "[:, :, 1:]\n")],
        "expected sample at nfe=1 to return torch.float32 [64, 1, 8, 8]",
    ),
    "imports_sibling": (
        [(IMPORT, "import distillbench_method_dmd\nimport torch\nfrom pydantic")],
        "expected no import of distillbench_method_dmd",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a method `demo` of `distillbench new`, and the teachers of the check."""
    made = Checkout(tmp_path_factory.mktemp("check"))
    # claims name it
    made.write(
        "workflows/benchmarks/digits.yaml", (ROOT / "workflows/benchmarks/digits.yaml").read_text()
    )
    done = made.run("distillbench", "new", "demo")
    assert done.returncode == 0, done.stderr
    return made


def examined(path: Path) -> Check:
    return Check(folders.read_folder(path), sliced_wasserstein, known_metrics, lambda *_: None)


def found(made: Checkout, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(made.folder)
    stages = check.examine(
        folders.read_folder(made.folder / "methods" / name),
        sliced_wasserstein,
        known_metrics,
        lambda *_: None,
    )
    return [str(f) for _, findings in stages for f in findings]


def copy(made: Checkout, name: str, changes: list[tuple[str, str]]) -> Path:
    path = made.folder / "methods" / name
    shutil.copytree(made.folder / "methods/demo", path)
    edit(path / "method.py", "from pydantic", IMPORT)
    edit(
        path / "README.md", "methods/demo/", f"methods/{name}/"
    ) if name != "missing_target" else None
    for old, new in changes:
        edit(path / "method.py", old, new)
    return path


def test_the_template_keeps_the_contract_and_gets_its_rows(made: Checkout):
    done = made.run("distillbench", "check", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo: keeps the contract" in done.stdout and "FAILED" not in done.stdout
    # beside all others; alone it is quicker
    assert "tiny-ring/demo: seeds 0, 1" in made.run("distillbench", "plan", "tiny-ring").stdout
    made.write(
        "workflows/tables/tiny-ring.yaml",
        "{name: tiny-ring, title: tiny-ring, benchmarks: [tiny-ring], methods: [demo]}\n",
    )
    table = made.snakemake("results/tiny-ring.md")
    assert (
        table.returncode == 0
        and '"method": "demo"' in (made.folder / "results/tiny-ring.json").read_text()
    ), table.stderr


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_copy_is_caught(made: Checkout, name: str, monkeypatch: pytest.MonkeyPatch):
    changes, expected = BROKEN[name]
    path = copy(made, name, changes)
    lines = found(made, name, monkeypatch)
    shutil.rmtree(path)
    print("\n".join(lines))
    assert any(expected in line for line in lines), lines
    assert all(line.startswith(f"methods/{name}/") for line in lines)


def test_an_equation_that_points_nowhere_is_caught(made: Checkout, monkeypatch: pytest.MonkeyPatch):
    path = copy(made, "missing_target", [])
    page = (path / "README.md").read_text().replace("methods/demo/", "methods/missing_target/")
    (path / "README.md").write_text(page.replace(":regression_loss", ":regresion_loss"))
    lines = found(made, "missing_target", monkeypatch)
    shutil.rmtree(path)
    where, what = (
        "methods/missing_target/README.md",
        "methods/missing_target/method.py:regresion_loss",
    )
    (line,) = lines
    assert line.startswith(f"{where}: expected every entry of the equation table")
    assert f"saw `{what}`" in line


def test_a_folder_outside_the_checkout(made: Checkout, monkeypatch: pytest.MonkeyPatch):
    """Its README is looked up beside its code, and it says how the tables find it."""
    done = made.run("distillbench", "new", "../paper/outside_method")
    assert done.returncode == 0 and "method_paths: [../paper/outside_method]" in done.stdout
    path = made.folder.parent / "paper/outside_method"
    assert (
        "`method.py:regression_loss`" in (path / "README.md").read_text()
        and "schema" not in (path / "config.yaml").read_text()
    )
    monkeypatch.chdir(made.folder)
    before = examined(path)
    edit(path / "claims.yaml", "digits: {metric", "digtis: {metric")
    before.files()
    assert before.broken == []  # claims were read before the edit
    after = examined(path)
    after.files()
    (finding,) = after.broken
    assert "unknown benchmark 'digtis', did you mean 'digits'?" in str(finding)


METRIC = "digits: {metric: fid"  # of the claim, not of the example in the comment


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            METRIC,
            METRIC.replace("fid", "fud"),
            "claims.yaml:8: expected claim DEMO-1 to name a metric of digits, did you mean 'fid'?",
        ),
        (METRIC, METRIC.replace("fid", "sliced_w2"), "saw sliced_w2"),  # of mixtures alone
        ("@short]", "@shrt]", "claim DEMO-1 to name a benchmark and arms that exist"),
        (
            "reported: []",
            "reported: [{where: Table 1, setting: s, metric: fid, value: 1, arm: claims@shrt}]",
            "the number of Table 1 to be beside an arm that exists",
        ),
    ],
)
def test_claims_that_nobody_can_judge(
    made: Checkout, monkeypatch: pytest.MonkeyPatch, old: str, new: str, expected: str
):
    monkeypatch.chdir(made.folder)
    path = copy(made, "claims", [])
    edit(path / "claims.yaml", "demo", "claims")
    edit(path / "claims.yaml", old, new)
    one = examined(path)
    one.files()
    shutil.rmtree(path)
    assert [expected in str(f) for f in one.broken] == [True], one.broken


def test_a_variant_from_scratch_with_a_teacher_is_caught(
    made: Checkout, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(made.folder)
    path = copy(made, "scratch", [])
    edit(
        path / "config.yaml",
        "    config: {pair_heun_steps: 4}",
        "    config: {pair_heun_steps: 4}\n    group: from_scratch",
    )
    one = examined(path)
    one.sampling()
    shutil.rmtree(path)
    (finding,) = one.broken
    assert "method.py @short: expected no error; saw ValueError: group: from_scratch" in str(
        finding
    )


def test_what_new_and_check_refuse(made: Checkout, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(made.folder)
    for name, why in {
        "demo": "is there already",
        "My-Method": "use small letters, digits and _, e.g. my_method",
        "teacher": "is taken",
        "torch": "is taken",
        "../paper/dmd": "'dmd' is taken",
    }.items():
        with pytest.raises(UserError, match=why):
            write_folder(name)
    for name, why in {"demmo": "did you mean 'demo'?", "workflows/": "no method.py there"}.items():
        done = made.run("distillbench", "check", name)
        assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1
