"""The measurement on a GPU, in small and without one.

Every method has a row, and what fails costs its own row only.
"""

import json

import pytest
import torch

from distillbench.method import Needs
from distillbench.registry import folders
from perf import gpu


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gpu.Path(__file__).parents[1])


def run(folder, *arguments: str) -> tuple[dict, str]:
    gpu.main(["--output", str(folder), "--tiny", "--seconds", "3600", *arguments])
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_every_method_has_a_row(tmp_path):
    result, page = run(tmp_path, "--precisions", "tf32", "bf16")
    methods = {gpu.BASELINE, *folders.discover()}
    rows = {(r["method"], r["precision"]): r for r in result["rows"]}
    assert set(rows) == {(m, p) for m in methods for p in ("tf32", "bf16")}
    assert not {k: r for k, r in rows.items() if r["status"] not in ("measured", "fp32 only")}
    for (method, precision), row in rows.items():
        if row["status"] == "fp32 only":
            assert precision == "bf16" and any(
                ".tangent" in role for role in rows[method, "tf32"]["evaluated_rows_per_cycle"]
            )
            continue
        moved = row["updates_per_cycle"]["teacher" if method == gpu.BASELINE else "student"]
        assert row["ms_per_step"] * row["cycle"] == pytest.approx(
            row["ms_per_student_update"] * moved, rel=1e-2
        )
        assert (
            row["tflop_per_cycle"] > 0
            and row["batch"] == gpu.TINY.batch
            and len(row["cycle_ms"]) == gpu.TINY.timed
        )
    assert (
        all(f"| {m} |" in page for m in methods)
        and rows["meanflow", "bf16"]["status"] == "fp32 only"
        and "fp32 only" in page
    )
    flow = rows[gpu.BASELINE, "tf32"]
    assert flow["evaluated_rows_per_cycle"] == {"teacher": gpu.TINY.batch} and flow[
        "updates_per_cycle"
    ] == {"teacher": 1}
    assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(
        "cpu"
    )


def test_the_whole_scale_is_the_papers():
    arm = folders.arm("dmd")
    cls, settings = gpu.configured(arm, gpu.FULL.batch)
    needs = cls.needs(settings)
    assert needs.batch == needs.pairs.batch == gpu.FULL.batch == 32, (
        "every batch of a method is set"
    )
    with torch.device("meta"):
        assert (
            sum(
                p.numel()
                for p in gpu.DiT(gpu.FULL.shape, gpu.FULL.classes, **gpu.FULL.network).parameters()
            )
            > 125e6
        )
    batch = gpu.random_batch(
        Needs(batch=4, nfe=(1,), headline_nfe=1, data=True), gpu.TINY, torch.device("cpu")
    )
    assert (
        batch.x.shape == (4, *gpu.TINY.shape)
        and batch.pairs is None
        and batch.cond.labels.max() < gpu.TINY.classes
    )


def test_a_failure_costs_its_own_row(tmp_path, monkeypatch):
    original, batches = gpu.measured, []

    def measured(arm, name, scale, batch, device):
        if arm is not None and arm.name == "meanflow":
            raise RuntimeError("planted")
        if arm is not None and arm.name == "sid" and batch > 4:
            batches.append(batch)
            raise torch.OutOfMemoryError("planted")
        return original(arm, name, scale, batch, device)

    monkeypatch.setattr(gpu, "measured", measured)
    result, page = run(tmp_path, "--arms", "meanflow", "sid", "tvm", "--precisions", "tf32")
    rows = {r["method"]: r for r in result["rows"]}
    assert (
        rows["meanflow"]["status"] == "failed"
        and "planted" in rows["meanflow"]["error"]
        and "RuntimeError: planted" in page
    )
    assert (
        batches == [8]
        and rows["sid"]["status"] == "measured"
        and rows["sid"]["batch"] == 4
        and "at batch 4" in page
    )
    assert rows["tvm"]["status"] == rows[gpu.BASELINE]["status"] == "measured"


def test_out_of_memory_at_every_batch_ends(tmp_path, monkeypatch):
    def measured(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(gpu, "measured", measured)
    result, _ = run(tmp_path, "--arms", "sid", "--precisions", "tf32")
    assert [r["status"] for r in result["rows"]] == ["out of memory at batch 4"] * 2


def test_a_counter_that_fails_does_not_end_the_row(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, display):
            raise AssertionError("planted")

    monkeypatch.setattr("distillbench.meter.FlopCounterMode", Broken)
    result, page = run(tmp_path, "--arms", "meanflow", "--precisions", "tf32")
    assert all(
        r["status"] == "measured" and "planted" in r["flops"] and r["updates_per_cycle"]
        for r in result["rows"]
    )
    assert "| meanflow |" in page


def test_time_runs_out_between_rows(tmp_path):
    result, page = run(tmp_path, "--seconds", "0", "--arms", "meanflow", "--precisions", "tf32")
    assert {r["status"] for r in result["rows"]} == {
        "not begun: no time left"
    } and "no time left" in page


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = folders.discover()["meanflow"]
    monkeypatch.setattr(folders, "discover", lambda: (_ for _ in ()).throw(ValueError("planted")))
    real = folders.read_folder
    monkeypatch.setattr(
        folders,
        "read_folder",
        lambda path: (
            real(path) if path == folder.path else (_ for _ in ()).throw(ValueError("broken"))
        ),
    )
    found, broken = gpu.readable_folders()
    assert set(found) == {"meanflow"} and "sid" in broken and "broken" in broken["sid"]
    result, page = run(tmp_path, "--precisions", "tf32")
    assert {r["status"] for r in result["rows"] if r["method"] == "sid"} == {
        "unreadable"
    } and "sid, any: unreadable" in page
