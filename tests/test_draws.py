"""`distillbench evaluate BENCHMARK ARM --draws N`: several sets of samples of one checkpoint.

Their spread is the error of sampling.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from eval.metrics import evaluate
from eval.report import protocol
from eval.samples import content_sha256
from tests.conftest import captured
from tests.released import run
from tests.test_cells import edit


def test_draws_are_independent_repeat_and_are_published(checkout, capsys, monkeypatch):
    edit(checkout.folder / "workflows/benchmarks/tiny.yaml", "seeds: [0, 1]", "seeds: [0]")
    checkout.write(
        "workflows/tables/tiny.yaml",
        "{name: tiny, title: tiny, benchmarks: [tiny], methods: [dmd], draws: true}\n",
    )
    scored = captured(monkeypatch, evaluate, "repeated_draws")
    assert run(capsys, "train", "tiny", "dmd")[0] == 0
    (folder,) = Path("results/runs/tiny/dmd").glob("seed0-*")
    file = folder / "draws.json"

    def draw(count: int) -> bytes:
        code, _, err = run(capsys, "evaluate", "tiny", "dmd", "--draws", str(count))
        assert code == 0, err
        return file.read_bytes()

    first = draw(3)
    sets, stored = scored[0][0][3], list(load_file(folder / "samples.safetensors").values())
    assert len(sets) == 3 and {len(x) for x in (*sets, *stored)} == {1000}
    assert len({content_sha256(x) for x in (*sets, *stored)}) == 3 + len(stored)
    found = json.loads(first)
    assert (found["draws"], found["nfe"], len({row["fid"] for row in found["rows"]})) == (3, 1, 3)
    assert all(row["fid_teacher"] and row["class_accuracy"] is not None for row in found["rows"])
    assert not (folder / "metrics.json").exists()  # they are beside the cell's metrics, not instead

    assert draw(3) == first and len(scored) == 1  # kept
    file.unlink()
    assert draw(3) == first and len(scored) == 2  # made again
    more = json.loads(draw(4))
    assert (
        more["draws"] == 4
        and more["rows"][:3] == found["rows"]
        and more["rows"][3] not in found["rows"]
    )
    assert draw(3) == first  # another number is never kept
    file.write_text(
        json.dumps(found | {"rows": [], "evaluation": found["evaluation"] | {"key": "0" * 12}})
    )
    assert draw(3) == first  # nor are those of another evaluation

    for arm in ("teacher", "dmd"):
        assert run(capsys, "evaluate", "tiny", arm)[0] == 0
    assert run(capsys, "table", "tiny")[0] == 0
    published = Path("results/records/tiny/tiny/dmd/seed0/draws.json")
    assert published.read_bytes() == first
    line = protocol.sampling_error(Path("results/records/tiny")).splitlines()[2]
    assert [c.strip() for c in line.strip("|").split("|")][:4] == ["dmd", "seed0", "1", "3"]

    file.unlink()
    assert run(capsys, "table", "tiny")[0] == 0
    assert published.read_bytes() == first  # the same numbers: of this checkpoint still
    metrics = published.with_name("metrics.json")
    other = json.loads(metrics.read_text())
    other["rows"][0]["fid"] += 1
    metrics.write_text(json.dumps(other))
    assert run(capsys, "table", "tiny")[0] == 0
    assert not published.exists()


def test_draws_of_a_mixture_are_refused(checkout, capsys):
    assert run(capsys, "train", "tiny-ring", "teacher", "--seeds", "0")[0] == 0
    code, _, err = run(capsys, "evaluate", "tiny-ring", "teacher", "--seeds", "0", "--draws", "2")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("distillbench: --draws: tiny-ring has no images")
