"""Findings from records: which values count, families, freezing, what stands on the page.

Claims that cannot be judged are refused before anything runs.
"""

from __future__ import annotations

import json
import math

import pytest
import yaml

from distillbench import config, reading
from distillbench.audits import questions
from distillbench.audits.experiments import Experiment
from distillbench.cli import audit_pages
from distillbench.cli.audit import run_experiment
from distillbench.cli.evaluate import known_metrics
from distillbench.config import Path, Table
from distillbench.errors import UserError
from distillbench.registry.claims import Claim, ClaimsFile
from eval.audit import findings, page
from eval.audit.findings import Finding
from eval.audit.verdicts import EDITED, INCONCLUSIVE, NOT_RUN, REVERSED, SUPPORTED
from eval.report import table3
from eval.report.records import Record

SEEDS = [10, 11, 12, 13, 14]
COMMIT = "c" * 40


def record(
    arm: str,
    seed: int,
    status: str = "done",
    commit: str = COMMIT,
    headline: int = 1,
    **metrics: float,
) -> Record:
    method, _, variant = arm.partition("@")
    result = {
        "benchmark": "digits",
        "method": method,
        "variant": variant or None,
        "seed": seed,
        "headline_nfe": headline,
        "status": status,
        "key": f"key-{seed}",
        "reason": None,
        "cost": {"limit_flops": 6e11, "seconds": 20.0},
        "provenance": {"commit": commit},
    }
    return Record(
        result,
        {"rows": [{"nfe": n, "fid": 1.0, **metrics} for n in (1, 2)]} if status == "done" else None,
    )


def question(**changes) -> dict:
    return {
        "id": "A-1",
        "method": "a",
        "title": "A",
        "claim": "a is better than b",
        "where": "Table 1",
        "kind": "comparative",
        "scale_free": False,
        "primary": True,
        "refuted_if": "it is not",
        "seen_before_freezing": None,
        "arms": ["a", "a@b"],
        "direction": "lower",
        "benchmark": "digits",
        "metric": "fid",
        "share": 0.25,
        "seeds": SEEDS,
        "margin": 0.05,
        "nfe": None,
        "threshold": None,
        "experiment": None,
        "value": None,
        "why_not": None,
        "claim_hash": "h1",
    } | changes


FROZEN = {COMMIT: {"claims": {"A-1": "h1", "A-2": "h1"}, "seeds": SEEDS}}


def arms(
    metric: str = "fid", a: float = 1.0, b: float = 2.0, n: int = 5, **more: float
) -> list[Record]:
    """Two arms whose metrics scatter by a hundredth."""
    spread = [0.99, 1.0, 1.01, 1.0, 0.995]
    return [
        record(arm, s, **{metric: middle * spread[s % 5]}, **more)
        for arm, middle in (("a", a), ("a@b", b))
        for s in SEEDS[:n]
    ]


def only(found: list[Finding]) -> Finding:
    (one,) = found
    return one


def test_a_finding_has_effect_interval_seeds_budget_and_verdict():
    one = only(findings.findings([question()], arms(), {}, FROZEN))
    assert (one.verdict, one.seeds_a, one.seeds_b, one.budget) == (
        SUPPORTED,
        5,
        5,
        6e11,
    )
    assert (
        one.effect == pytest.approx(math.log(2), abs=1e-9) and one.ci_low < one.effect < one.ci_high
    )
    assert one.cells["a"][10] == "key-10" and one.commits == [COMMIT]
    twin = one.twin()
    assert list(twin)[:-1] == [
        "id",
        "method",
        "kind",
        "source",
        "benchmark",
        "verdict",
        "reason",
        "effect",
        "ci_low",
        "ci_high",
        "margin",
        "seeds_a",
        "seeds_b",
        "budget",
        "claim_hash",
    ]
    json.dumps(twin, allow_nan=False)


def test_only_the_audits_seeds_count():
    stray = [record("a", 0, fid=100.0), record("a", 99, fid=100.0)]
    assert only(findings.findings([question()], arms() + stray, {}, FROZEN)).values["a"] == [
        0.99,
        1.0,
        1.01,
        1.0,
        0.995,
    ]


def test_missing_seeds_are_not_run_and_failed_ones_stay_in():
    one = only(findings.findings([question()], arms(n=4), {}, FROZEN))
    assert (one.verdict, one.reason) == (NOT_RUN, "compute: 1 of 5 seeds of a are not there")
    failed = [
        record("a", 10, "diverged"),
        *(r for r in arms() if (r.arm, r.result["seed"]) != ("a", 10)),
    ]
    one = only(findings.findings([question()], failed, {}, FROZEN))
    assert (one.verdict, one.reason, one.seeds_a) == (
        INCONCLUSIVE,
        "1 seeds of the arms that the effect favours failed",
        4,
    )
    other = [
        record("a@b", 10, "diverged"),
        *(r for r in arms() if (r.arm, r.result["seed"]) != ("a@b", 10)),
    ]
    one = only(findings.findings([question()], other, {}, FROZEN))
    assert (one.verdict, one.reason, one.seeds_b) == (SUPPORTED, "provisional", 4)


def test_the_second_extractor_may_object():
    records = [
        record(r.arm, r.result["seed"], fid=r.rows[0]["fid"], fid_cross=1 / r.rows[0]["fid"])
        for r in arms()
    ]
    one = only(findings.findings([question()], records, {}, FROZEN))
    assert one.verdict == INCONCLUSIVE and one.reason.startswith("metric conflict: fid_cross")
    agreeing = [
        record(r.arm, r.result["seed"], fid=r.rows[0]["fid"], fid_cross=r.rows[0]["fid"])
        for r in arms()
    ]
    assert only(findings.findings([question()], agreeing, {}, FROZEN)).verdict == SUPPORTED


def test_a_claim_changed_or_registered_after_its_runs_is_edited():
    one = only(findings.findings([question(claim_hash="h2")], arms(), {}, FROZEN))
    assert one.verdict == EDITED and one.reason.startswith(
        "changed after its runs, which record commit cccccccccccc"
    )
    assert only(findings.findings([question(id="A-9")], arms(), {}, FROZEN)).reason.startswith(
        "registered after"
    )
    mixed = [*arms()[:-1], record("a@b", 14, commit="d" * 40, fid=2.0)]
    # one run of a commit without it
    assert only(findings.findings([question()], mixed, {}, FROZEN)).verdict == EDITED
    assert (
        only(
            findings.findings([question()], mixed, {}, FROZEN | {"d" * 40: FROZEN[COMMIT]})
        ).verdict
        == SUPPORTED
    )


def test_families_are_a_papers_primary_claims():
    weak = arms(b=1.03)
    alone = only(findings.findings([question(margin=0.01)], weak, {}, FROZEN))
    both = findings.findings(
        [question(margin=0.01), question(margin=0.01, id="A-2", direction="higher")],
        weak,
        {},
        FROZEN,
    )
    assert both[0].p_adjusted == pytest.approx(2 * alone.p_adjusted)
    # registered, not run yet
    idle = findings.findings(
        [question(margin=0.01), question(id="A-2", arms=["a", "a@c"])], weak, {}, FROZEN
    )
    assert idle[1].verdict == NOT_RUN and idle[0].p_adjusted == pytest.approx(2 * alone.p_adjusted)
    never = findings.findings(
        [question(margin=0.01), question(id="A-2", why_not="no data")], weak, {}, FROZEN
    )
    assert never[0].p_adjusted == alone.p_adjusted
    other = findings.findings(
        [question(margin=0.01), question(margin=0.01, id="A-2", primary=False)], weak, {}, FROZEN
    )
    assert other[0].p_adjusted == alone.p_adjusted
    paper = findings.findings(
        [question(margin=0.01), question(margin=0.01, id="A-2", method="b")], weak, {}, FROZEN
    )
    assert paper[0].p_adjusted == alone.p_adjusted


def test_derived_metrics_other_nfe_and_instability():
    records = [
        record(r.arm, r.result["seed"], class_accuracy=1 - r.rows[0]["fid"] / 100) for r in arms()
    ]
    one = only(findings.findings([question(metric="class_error")], records, {}, FROZEN))
    assert one.verdict == SUPPORTED and one.values["a"][1] == pytest.approx(0.01)
    one = only(
        findings.findings(
            [question(kind="instability", threshold=1.5, arms=["a@b", "a"])], arms(), {}, FROZEN
        )
    )
    assert one.verdict == SUPPORTED and one.effect == 1
    one = only(
        findings.findings([question(kind="instability", arms=["a", "a@b"])], arms(), {}, FROZEN)
    )
    assert one.verdict == INCONCLUSIVE and one.effect == 0
    assert (
        only(findings.findings([question(nfe=4)], arms(), {}, FROZEN)).reason
        == "a has no fid at 4 NFE"
    )


def test_who_is_to_blame():
    """A cell whose teacher failed says nothing; of an instability only divergence counts."""
    refused = [
        record("a", 10, "refused"),
        *(r for r in arms() if (r.arm, r.result["seed"]) != ("a", 10)),
    ]
    one = only(findings.findings([question()], refused, {}, FROZEN))
    assert one.verdict == NOT_RUN and one.reason.startswith("a seed 10 ended as refused")
    late = [record("a", s, "timeout") for s in SEEDS] + [r for r in arms() if r.arm == "a@b"]
    assert (
        only(findings.findings([question(kind="instability")], late, {}, FROZEN)).verdict == NOT_RUN
    )
    diverged = [record("a", s, "diverged") for s in SEEDS] + [r for r in arms() if r.arm == "a@b"]
    assert (
        only(findings.findings([question(kind="instability")], diverged, {}, FROZEN)).verdict
        == SUPPORTED
    )
    gone = only(findings.findings([question()], diverged, {}, FROZEN))
    assert (gone.verdict, gone.effect) == (NOT_RUN, None)
    assert gone.reason.startswith("no seed of a came to an end; seed 10 ended as diverged")
    worse = arms(a=2.0, b=1.0)
    worse = [
        record("a@b", 10, "diverged"),
        *(r for r in worse if (r.arm, r.result["seed"]) != ("a@b", 10)),
    ]
    # the arm that came out better failed once
    blocked = only(findings.findings([question()], worse, {}, FROZEN))
    assert (blocked.verdict, blocked.reason) == (
        INCONCLUSIVE,
        "1 seeds of the arms that the effect favours failed",
    )


def test_seeds_are_frozen_too_and_what_is_withdrawn_is_named():
    other = {COMMIT: FROZEN[COMMIT] | {"seeds": [14, 13, 12, 11, 10]}}
    assert only(findings.findings([question()], arms(), {}, other)).reason.startswith(
        "its seeds were others in commit ccc"
    )
    assert only(findings.findings([question()], arms(), {}, {})).reason.endswith("is not known")
    assert findings.withdrawn([question()], FROZEN) == ["A-2"]


def test_quantities_of_an_experiment():
    values = [
        {
            "experiment": "e",
            "seed": s,
            "key": "k",
            "values": {"near": 1 + s / 1000, "far": 2 + s / 1000},
            "seconds": 1.0,
            "provenance": {"commit": COMMIT},
        }
        for s in SEEDS
    ]
    asked = question(
        kind="mechanism", experiment="e", arms=["near", "far"], metric="error", share=None
    )
    one = only(findings.findings([asked], [], {"e": values}, FROZEN))
    assert one.verdict == SUPPORTED and one.budget is None
    bound = question(kind="mechanism", experiment="e", arms=["far"], direction="higher", value=1.0)
    assert only(findings.findings([bound], [], {"e": values}, FROZEN)).effect == pytest.approx(
        math.log(2.012), abs=1e-3
    )
    near = only(findings.findings([bound | {"value": 1.95}], [], {"e": values}, FROZEN))
    assert near.verdict == SUPPORTED  # a bound that holds by less than a margin is no equivalence
    assert (
        only(findings.findings([bound | {"value": 2.1}], [], {"e": values}, FROZEN)).verdict
        == REVERSED
    )
    gone = only(findings.findings([asked | {"arms": ["near", "for"]}], [], {"e": values}, FROZEN))
    assert (gone.verdict, gone.reason) == (NOT_RUN, "e measures no 'for'")
    values[1] = values[1] | {"values": {}, "failed": "the teacher diverged"}
    lost = only(findings.findings([asked], [], {"e": values}, FROZEN))
    assert (lost.verdict, lost.reason) == (
        NOT_RUN,
        "e failed on seed 11: the teacher diverged",
    )


@pytest.mark.parametrize(
    "body",
    [
        "return {'far': float('nan')}",
        "raise ValueError('not a number of ours')",
        "return {}",
        "from distillbench.errors import Diverged; raise Diverged('nan')",
        "return {'far': 1 / 0}",
    ],
)
def test_an_experiment_that_fails_leaves_a_record(checkout, body, capsys):
    head = "BENCHMARK = 'check-mixture'\nMETHODS = ('dmd',)\n"
    checkout.write(
        "mechanisms/breaks.py",
        f"{head}def measure(seed):\n"
        f"    if seed == 10:\n        return {{'far': 1.0}}\n"
        f"    {body}\n",
    )
    run_experiment("breaks", [10, 11], lambda *_: None)
    good, bad = (
        json.loads(p.read_text())
        for p in sorted((checkout.folder / "results/runs/mechanisms/breaks").glob("seed*.json"))
    )
    assert good["values"] == {"far": 1.0} and "failed" not in good
    assert bad["values"] == {} and bad["failed"]
    assert f"mechanisms/breaks.py, seed 11: failed: {bad['failed']}" in capsys.readouterr().err
    assert Experiment("breaks", (10, 11)).sync()


def test_the_page_holds_everything_and_is_a_function_of_its_arguments():
    asked = [
        question(),
        question(id="A-2", direction="higher"),
        question(id="A-3", benchmark=None, why_not="no data"),
    ]
    found = findings.findings(asked, arms(), {}, FROZEN)
    about = page.Audit("audit", "10 to 14", 10, 0, 0.1, "snakemake")
    text = page.page(
        "Audit",
        found,
        about,
        {"A-2/digits": {"bug": "looked", "noise": "none", "scale": "small"}},
    )
    assert text == page.page(
        "Audit",
        found,
        about,
        {"A-2/digits": {"bug": "looked", "noise": "none", "scale": "small"}},
    )
    for words in (
        "| **[A-1](#a-1-digits)** | **SUPPORTED** ",
        "REVERSED AT SCALE",
        "Not run (1):",
        "no data",
        '<details id="a-1-digits">',
        "distillbench audit --claim A-1 --benchmark digits",
        "- bug: looked",
        "0.99 1 1.01 1 0.995",
        "claim h1",
    ):
        assert words.lower() in text.lower(), words
    assert page.forest(found) == page.forest(found)
    written = {}
    page.write(
        "Audit",
        found,
        about,
        {},
        Path("/x"),
        lambda path, data: written.update({path.name: data}),
    )
    assert set(written) == {"audit.md", "audit.json", "audit.csv", "a.png"}
    assert len(written["audit.csv"].decode().splitlines()) == 4


def test_a_second_audit_names_the_verdicts_that_changed():
    names = [question(), question(id="A-2"), question(id="A-3", benchmark=None, why_not="no data")]
    first = findings.findings(names, arms(), {}, FROZEN)
    before = page.Earlier("audit", "1 to 5", first)
    about = page.Audit("again", "10 to 14", 10, 0, 0.1, "snakemake", before=before)
    same = page.page("Again", first, about, {})
    assert (
        "2 questions have a verdict in both (0 in the first alone); "
        "0 of them another one, 0 the opposite one. " in same
    )
    assert "Effects have the same sign in 2 of 2; in 2 the one found here" in same
    found = (
        findings.findings([names[0] | {"scale_free": True}], arms(a=2.0, b=1.0), {}, FROZEN)
        + first[1:]
    )
    text = page.page("Again", found, about, {})
    assert (
        "2 questions have a verdict in both (0 in the first alone); "
        "1 of them another one, 1 the opposite one. " in text
    )
    assert "Effects have the same sign in 1 of 2; in 1 the one found here" in text
    row = next(line for line in text.splitlines() if line.startswith("| **[A-1]")).split("|")
    assert [cell.split("(")[0].strip() for cell in row[2:6]] == [
        "**SUPPORTED**",
        "**CONTRADICTED**",
        "+100%",
        "−50%",
    ]


def test_a_second_audit_is_compared_with_an_audit_on_other_seeds(checkout):
    table = (
        "{{name: {name}, title: t, kind: {kind}, benchmarks: [tiny-ring], methods: [dmd], "
        "seeds: {seeds}{more}}}\n"
    )

    def made(
        name: str, seeds: list[int], kind: str = "audit", more: str = ", again_of: first"
    ) -> Table:
        checkout.write(
            f"workflows/tables/{name}.yaml",
            table.format(name=name, kind=kind, seeds=seeds, more=more),
        )
        return config.table(name)

    first = made("first", [1, 2], more="")
    assert audit_pages.before(first) is None
    with pytest.raises(UserError, match="results/records/first: no published records"):
        audit_pages.before(made("second", [3, 4]))
    with pytest.raises(UserError, match="again_of: 'first' is no audit"):
        audit_pages.before(made("second", [2, 3]))
    with pytest.raises(UserError, match="again_of: 'tiny-ring' is no audit"):
        audit_pages.before(made("second", [3, 4], more=", again_of: tiny-ring"))
    with pytest.raises(UserError, match="again_of is a key of an audit"):
        made("second", [3, 4], kind="metrics")
    with pytest.raises(UserError, match="beside is a key of a table of metrics"):
        made("second", [3, 4], more=", beside: first")


def test_table_3_sets_a_papers_numbers_beside_arms():
    paper = {
        "reported": [
            {
                "where": "Table 1",
                "setting": "s",
                "metric": "fid",
                "value": 3.5,
                "arm": arm,
                "nfe": 1,
                "budget": None,
                "protocol": "50k",
            }
            for arm in ("a", "a@b", "a@gone", None)
        ]
    }
    found = table3.beside([table3.Paper("a", "A", tuple(paper["reported"]))], arms())
    text = table3.markdown(found, "audit")
    assert (
        len(found) == 3
        and "0.999 ± 0.00" in text
        and "(n 5)" in text
        and "Another scale" in text
        and "protocol: 50k" in text
    )


CLAIM = {
    "id": "X-1",
    "claim": "c",
    "where": "Table 1",
    "kind": "comparative",
    "scale_free": False,
    "primary": True,
    "refuted_if": "r",
    "arms": ["meanflow", "tvm"],
    "trials": {"tiny-ring": {"metric": "sliced_w2", "seeds": 3}},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": ["meanflw", "tvm"]}, "did you mean 'meanflow'?"),
        (
            {"arms": ["meanflow", "tvm@nothing"]},
            "claim X-1 to name a benchmark and arms that exist",
        ),
        (
            {"trials": {"tiny-ring": {"metric": "fid", "seeds": 3}}},
            "expected claim X-1 to name a metric of tiny-ring, known: ",
        ),
        ({"trials": {"tiny-rng": {"metric": "fid", "seeds": 3}}}, "did you mean 'tiny-ring'?"),
        (
            {"trials": {"tiny-ring": {"metric": "sliced_w2", "seeds": 3, "margin": -0.1}}},
            "ring.margin: ",
        ),
        (
            {"trials": {"tiny-ring": {"metric": "sliced_w2", "seeds": 9}}},
            "9 seeds on tiny-ring, workflows/tables/a.yaml has 4",
        ),
        ({"where": ""}, "claims.0.where: "),
        ({"kind": "monotone"}, "takes three arms or more, here are 2"),
        (
            {"kind": "mechanism", "experiment": "nothing"},
            "claim X-1 to name an experiment, known: ",
        ),
        ({"metric": "fid"}, "unknown key 'claims.0.metric'"),
        ({"id": "X 1"}, "claims.0.id: "),
        ({"untestable": "why"}, "untestable: remove arms"),
    ],
)
def test_a_wrong_claim_is_one_line_with_file_line_and_remedy(checkout, change, words):
    for path in (checkout.folder / "methods").glob("*/claims.yaml"):
        path.write_text("claims: []\n")
    checkout.write(
        "methods/dmd/claims.yaml",
        "# a comment\n" + yaml.safe_dump({"claims": [CLAIM | change]}, sort_keys=False),
    )
    checkout.write(
        "workflows/tables/a.yaml",
        "{name: a, title: a, kind: audit, benchmarks: [tiny-ring], methods: [dmd], "
        "seeds: [1, 2, 3, 4]}\n",
    )
    with pytest.raises(UserError) as error:
        questions.of_table(config.table("a"), known_metrics)
    text = str(error.value)
    assert words in text and "methods/dmd/claims.yaml:" in text and "\n" not in text
    assert int(text.partition("claims.yaml:")[2].partition(":")[0]) > 1


def test_ids_are_unique_and_numbers_have_a_source(checkout):
    checkout.write("methods/dmd/claims.yaml", yaml.safe_dump({"claims": [CLAIM]}))
    checkout.write("methods/tvm/claims.yaml", yaml.safe_dump({"claims": [CLAIM]}))
    checkout.write(
        "workflows/tables/a.yaml",
        "{name: a, title: a, kind: audit, benchmarks: [tiny-ring], methods: [dmd, tvm], "
        "seeds: [1, 2, 3]}\n",
    )
    with pytest.raises(
        UserError,
        match=r"tvm/claims.yaml:2: claim id 'X-1' is also at .*dmd/claims.yaml:2: .* rename one",
    ):
        questions.of_table(config.table("a"), known_metrics)
    checkout.write("methods/tvm/claims.yaml", "claims:\n- &a\n  id: X-1\n")
    checkout.write("methods/dmd/claims.yaml", yaml.safe_dump({"claims": [CLAIM, CLAIM]}))
    with pytest.raises(UserError, match="claim id 'X-1' is given twice"):
        reading.read(checkout.folder / "methods/dmd/claims.yaml", ClaimsFile, lines=True)
    checkout.write(
        "methods/dmd/claims.yaml", "reported:\n- {setting: s, metric: fid, value: 1.0}\n"
    )
    with pytest.raises(UserError, match=r"claims.yaml:2: key 'reported.0.where' is missing"):
        reading.read(checkout.folder / "methods/dmd/claims.yaml", ClaimsFile, lines=True)


def test_a_hash_knows_every_choice():
    base = Claim.model_validate(CLAIM)
    assert base.hash() == Claim.model_validate(CLAIM).hash()
    trials = {"tiny-ring": {"metric": "sliced_w2", "seeds": 3, "margin": 0.02001}}
    for change in (
        {"trials": trials},
        {"primary": False},
        {"arms": ["tvm", "meanflow"]},
        {"refuted_if": "o"},
        {"direction": "higher"},
    ):
        assert Claim.model_validate(CLAIM | change).hash() != base.hash()
