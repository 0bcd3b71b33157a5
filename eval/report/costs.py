"""results/table1.md, .csv and .json: what each method is and what it costs, a pure function of published records and of what
the methods' folders say (`distillbench/anatomy.py`, handed in as plain dictionaries).

A declared cost (`cost` in config.yaml) lists the evaluations of one cycle as the paper's algorithm needs them. It is compared with
what the meter saw (`disagreements`), and gives the algorithmic minimum: rows times FLOPs of one evaluation of that network, forward
and, as declared, backward. A tangent counts as a forward evaluation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from eval.report.records import Record
from eval.report.rows import Row, fidelity_words, summarise

SHARES = (0.25, 1.0, 4.0)  # of the budget, shown in any case
SHARE = re.compile(
    r"(?:^|@)x[0-9.]+$"
)  # what a variant's name ends in where another share of the budget was spent
MISSING = "–"


def per_cycle(record: Record) -> tuple[float, float]:
    """(cycles of updates of the run, rows of a batch)."""
    cost = record.result["cost"]
    return cost["updates"]["student"] / cost["calls_per_cycle"]["student.backward"], cost[
        "images"
    ] / cost["steps"]


def metered(record: Record, anatomy: Row) -> dict[str, tuple[float, float]]:
    """role -> (calls, rows in batches) of one cycle, without set-up; the rows of self-supervised features are the declared ones.

    Set-up rows are in the record's total. Those of the teacher are known (pairs by Heun steps of two evaluations); how many
    images the training of features saw is not, so that their rows cannot be told apart and are left out (0).
    """
    cost, (cycles, batch), needs = record.result["cost"], per_cycle(record), anatomy["needs"]
    pairs = needs["pairs"]
    setup = {"teacher": pairs["count"] * pairs["heun_steps"] * 2 if pairs else 0}
    calls = {
        role: n for role, n in cost["calls_per_cycle"].items() if not role.endswith(".backward")
    }
    found = {
        role: (n, (cost["rows"][role] - setup.get(role, 0)) / (cycles * batch))
        for role, n in calls.items()
    }
    if "features" in found and needs["features"] == "self_supervised":
        found["features"] = (found["features"][0], 0.0)
    return found


def declared(anatomy: Row, roles: list[str]) -> dict[str, list[Row]]:
    """role -> declared evaluations, over the metered roles too: those of a player's further networks, where they are not declared
    by themselves, are those of its first."""
    own: dict[str, list[Row]] = {}
    for entry in anatomy["cost"] or []:
        own.setdefault(entry["role"], []).append(entry)
    for role in roles:
        first, _, number = role.rpartition(".")
        if role not in own and number.isdigit() and first in own:
            own[role] = own[first]
    return own


def disagreements(record: Record, anatomy: Row) -> list[str]:
    """Roles whose declared calls or rows are not those of the meter, in words; empty where no cost is declared."""
    if anatomy["cost"] is None:
        return []
    seen = metered(record, anatomy)
    own, out = declared(anatomy, list(seen)), []
    for role in sorted({*own, *seen}):
        calls, rows = (
            sum(e["calls"] for e in own.get(role, [])),
            [e["rows"] for e in own.get(role, [])],
        )
        got_calls, got_rows = seen.get(role, (0, 0.0))
        known = got_rows and None not in rows
        if calls != got_calls or (known and abs(sum(rows) - got_rows) > 0.01 * got_rows):
            words = "as many" if None in rows else f"{sum(rows):g}"
            out.append(
                f"{role}: declared {calls} calls of {words} batches in a cycle, metered {got_calls} of {got_rows:.4g}"
            )
    return out


def minimum(record: Record, anatomy: Row) -> float | None:
    """FLOPs of a cycle that the declared evaluations need at least; None where a cost or a network's FLOPs are not known."""
    seen, (_, batch), total = metered(record, anatomy), per_cycle(record), 0.0
    for role, entries in declared(anatomy, list(seen)).items():
        network = anatomy["networks"].get(role.removesuffix(".tangent"))
        if network is None or network["flops"] is None:
            return None
        for e in entries:
            blocks, all_blocks = e["blocks"], network["blocks"]
            flops = (
                network["flops"] if blocks is None else all_blocks[min(blocks, len(all_blocks)) - 1]
            )
            rows = seen[role][1] if e["rows"] is None and role in seen else e["rows"] or 0
            total += (
                rows
                * batch
                * (flops["forward"] + (0 if e["gradient"] == "none" else flops[e["gradient"]]))
            )
    return total or None


def cost_rows(records: list[Record], anatomies: dict[tuple[str, str], Row]) -> list[Row]:
    """One row for each (benchmark, arm) of a method in `records`, by benchmark and name; a failed arm says so and has no counts."""
    rows = []
    for benchmark, arm in sorted(
        {(r.result["benchmark"], r.arm) for r in records if r.result["group"] != "teacher"}
    ):
        own = [r for r in records if (r.result["benchmark"], r.arm) == (benchmark, arm)]
        anatomy = anatomies.get((benchmark, arm), {"error": "not in this checkout"})
        rows.append(_row(own, anatomy))
    return rows


def _row(own: list[Record], anatomy: Row) -> Row:
    first, done = own[0].result, [r for r in own if r.result["status"] == "done"]
    row: Row = {
        "benchmark": first["benchmark"],
        "method": first["method"],
        "variant": first["variant"],
        "group": first["group"],
        "title": first["title"] + (f" ({first['variant']})" if first["variant"] else ""),
        "fidelity": first["fidelity"],
        "adaptation": first["adaptation"],
        "start": first.get("start"),
        "status": "done" if done else first["reason"],
        "seeds": len(done),
        "error": anatomy.get("error"),
    }
    if "error" not in anatomy:
        trained = {n["role"]: n["params"] for nets in anatomy["players"].values() for n in nets}
        players = {
            name: [{k: n[k] for k in ("role", "kind", "params")} for n in nets]
            for name, nets in anatomy["players"].items()
        }
        row |= {
            "players": players,
            "needs": anatomy["needs"],
            "params_trained": sum(trained.values()),
        }
    if done:
        row |= _counts(done)
        if "error" not in anatomy:
            row |= _against_minimum(done[0], anatomy)
    return row


def _counts(done: list[Record]) -> Row:
    """What the records of an arm's finished seeds say; calls and rows per update of the student, set-up rows included in `rows`."""
    result, cost = done[0].result, done[0].result["cost"]
    updates = cost["updates"]["student"]
    per_update = (cost["flops"] - cost["setup_flops"]) / updates
    calls = cost["calls_per_cycle"]
    return {
        "nfe": result["nfe"],
        "headline_nfe": result["headline_nfe"],
        "params": result["params"],
        "batch": cost["images"] / cost["steps"],
        "updates": cost["updates"],
        "calls": {role: n / calls["student.backward"] for role, n in calls.items()},
        "rows": {role: n / updates for role, n in cost["rows"].items()},
        "flops_update": per_update,
        "setup_flops": cost["setup_flops"],
        "budget_flops": cost["limit_flops"],
        "memory_mb": max(r.result["cost"]["peak_memory_mb"] for r in done),
        "seconds_update": summarise(
            r.result["cost"]["seconds"] / r.result["cost"]["updates"]["student"] for r in done
        )[0],
        "hardware": machines(done),
    }


def _threads(record: Record) -> str:
    n = record.result["provenance"]["threads"]
    return f"{n} thread{'s' if n != 1 else ''}"


def _against_minimum(record: Record, anatomy: Row) -> Row:
    found, cost = minimum(record, anatomy), record.result["cost"]
    per_cycle_updates = cost["calls_per_cycle"]["student.backward"]
    per_update = (cost["flops"] - cost["setup_flops"]) / cost["updates"]["student"]
    least = None if found is None else found / per_cycle_updates
    rows = {
        role: entry[1] * per_cycle(record)[1] / per_cycle_updates
        for role, entry in metered(record, anatomy).items()
    }
    if rows.get("features") == 0:
        entries = declared(anatomy, ["features"]).get("features", [])
        rows["features"] = (
            sum(e["rows"] or 0 for e in entries) * per_cycle(record)[1] / per_cycle_updates or None
        )
    return {
        "rows": rows,
        "flops_minimum": least,
        "ratio": None if least is None else per_update / least,
        "disagreements": disagreements(record, anatomy),
    }


def machines(records: list[Record]) -> list[str]:
    """Where these cells were trained: processor and threads."""
    return sorted({f"{r.result['provenance']['hardware']}, {_threads(r)}" for r in records})


def quality_rows(records: list[Record]) -> list[Row]:
    """FID (sliced W2 on mixtures) at the headline NFE by share of the budget, a row for each (benchmark, arm, share)."""
    found: dict[tuple[str, str, float], list[Record]] = {}
    for r in records:
        if r.result["group"] != "teacher":
            variant = SHARE.sub("", r.result["variant"] or "")
            arm = r.result["method"] + (f"@{variant}" if variant else "")
            found.setdefault(
                (r.result["benchmark"], arm, float(r.result.get("budget_share", 1))), []
            ).append(r)
    out = []
    for (benchmark, arm, share), own in sorted(found.items()):
        done = [(r, row) for r in own for row in r.rows if row["nfe"] == r.result["headline_nfe"]]
        metric = "fid" if not done or "fid" in done[0][1] else "sliced_w2"
        mean, sd = summarise(row[metric] for _, row in done)
        seconds = summarise(
            r.result["cost"]["seconds"] + r.result["cost"].get("start", {}).get("seconds", 0)
            for r, _ in done
        )[0]
        title = own[0].result["title"] + (f" ({arm.partition('@')[2]})" if "@" in arm else "")
        base = {
            "benchmark": benchmark,
            "arm": arm,
            "title": title,
            "share": share,
            "metric": metric,
            "hardware": machines(own),
        }
        out.append(
            base
            | {
                "mean": mean,
                "sd": sd,
                "seeds": len(done),
                "seconds": seconds,
                "failed": len(own) - len(done),
            }
        )
    return out


def needs_words(row: Row) -> str:
    """What a method asks for, as a phrase."""
    needs = row["needs"]
    words = ["teacher"] if needs["teacher"] else []
    words += ["real data"] if needs["data"] else []
    if pairs := needs["pairs"]:
        words.append(f"{pairs['count']:,} pairs of the teacher ({pairs['heun_steps']} Heun steps)")
    if needs["features"]:
        words.append(f"frozen features ({needs['features'].replace('_', '-')})")
    if row["start"]:
        words.append(f"finished {row['start']}")
    known = {"batch", "nfe", "headline_nfe", "data", "teacher", "pairs", "features", "cycle"}
    words += [
        f"{key} {value}"
        for key, value in needs.items()
        if key not in known and value not in (None, False)
    ]
    return ", ".join(words) or "noise alone"


def trained_words(row: Row) -> str:
    """The players with their networks, as a phrase."""
    out = []
    for name, networks in row["players"].items():
        full = sum(n["kind"] == "velocity" for n in networks)
        heads = len(networks) - full
        some = "head" if heads == 1 else f"{heads} heads"
        out.append(name if not heads else f"{name} ({some})" if not full else f"{name} + {some}")
    return ", ".join(out)


def _millions(value: float | None) -> str:
    return MISSING if value is None else f"{value / 1e6:.2f}M"


def _number(value: float) -> str:
    return f"{value:.4g}"


def evaluations(row: Row, roles: Callable[[str], bool]) -> str:
    """'2 (128)': calls and rows of one update of the student, by role where there are several."""
    parts = []
    for role, calls in row["calls"].items():
        if roles(role) and not role.endswith(".backward"):
            rows = row["rows"].get(role)
            parts.append((role, f"{_number(calls)} ({MISSING if rows is None else _number(rows)})"))
    if len({words for _, words in parts}) == 1 and len(parts) > 1:
        return f"{len(parts)} × {parts[0][1]}"
    return (
        parts[0][1]
        if len(parts) == 1
        else ", ".join(f"{role} {words}" for role, words in parts) or MISSING
    )


def is_other(role: str) -> bool:
    """Of neither student, teacher nor features: critics, discriminators."""
    return role.partition(".")[0] not in ("student", "teacher", "features")


def _method_table(rows: list[Row]) -> str:
    head = ["method", "trains", "needs", "NFE", "params", "all trained", "fidelity"]
    body = []
    for r in rows:
        if "players" not in r or "nfe" not in r:
            body.append(
                [r["title"], (r["error"] or r["status"]).replace("|", "\\|"), *[MISSING] * 5]
            )
            continue
        nfe = ", ".join(f"**{n}**" if n == r["headline_nfe"] else str(n) for n in r["nfe"])
        sizes = [_millions(r["params"]), _millions(r["params_trained"])]
        body.append(
            [
                r["title"],
                trained_words(r),
                needs_words(r),
                nfe,
                *sizes,
                fidelity_words(r) or MISSING,
            ]
        )
    return tabulate(body, head, "github", disable_numparse=True)


def _update_table(rows: list[Row]) -> str:
    head = [
        "method",
        "batch",
        "student",
        "tangent",
        "teacher",
        "critic, heads",
        "their updates",
        "features",
        "MFLOP",
        "minimum",
        "ratio",
    ]
    body = []
    for r in rows:
        if "calls" not in r:
            continue
        updates = {
            p: n / r["updates"]["student"] for p, n in r["updates"].items() if p != "student"
        }
        least, ratio = r.get("flops_minimum"), r.get("ratio")
        body.append(
            [
                r["title"],
                _number(r["batch"]),
                evaluations(r, lambda role: role == "student"),
                evaluations(r, lambda role: role == "student.tangent"),
                evaluations(r, lambda role: role == "teacher"),
                evaluations(r, is_other),
                ", ".join(map(_number, updates.values())) or MISSING,
                evaluations(r, lambda role: role == "features"),
                f"{r['flops_update'] / 1e6:.0f}",
                MISSING if least is None else f"{least / 1e6:.0f}",
                MISSING if ratio is None else f"{ratio:.3f}",
            ]
        )
    return tabulate(body, head, "github", disable_numparse=True)


def _budget_table(rows: list[Row]) -> str:
    head = ["method", "TFLOP", "of it set-up", "student updates", "s / update", "peak memory", "n"]
    body = [
        [
            r["title"],
            f"{r['budget_flops'] / 1e12:.2f}",
            f"{r['setup_flops'] / 1e12:.2f}" if r["setup_flops"] else MISSING,
            f"{r['updates']['student']:,}",
            f"{r['seconds_update']:.3f}",
            f"{r['memory_mb']} MiB",
            r["seeds"],
        ]
        for r in rows
        if "calls" in r
    ]
    return tabulate(body, head, "github", disable_numparse=True)


def _quality_table(rows: list[Row]) -> str:
    shares = sorted({*SHARES, *(r["share"] for r in rows)})
    name = {"fid": "FID", "sliced_w2": "sliced W2"}[rows[0]["metric"]] if rows else "FID"
    head = ["method", *(f"{name} ↓, {s:g}× (s)" for s in shares)]
    body = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        own = {r["share"]: r for r in rows if r["arm"] == arm}
        body.append([next(iter(own.values()))["title"], *(_quality(own.get(s)) for s in shares)])
    return tabulate(body, head, "github", disable_numparse=True)


def _quality(row: Row | None) -> str:
    if row is None:
        return "—"
    if row["mean"] is None:
        return "failed"
    spread = f" ± {row['sd']:.3f}" if row["sd"] else ""
    return f"{row['mean']:.3f}{spread} ({row['seconds']:.0f} s, n={row['seeds']})"


def markdown(title: str, rows: list[Row], quality: list[Row], sources: tuple[str, str]) -> str:
    """The page; `sources`: tables whose records stand behind the costs and behind the qualities."""
    out = [f"# {title}", ""]
    for benchmark in dict.fromkeys(r["benchmark"] for r in rows):
        own = [r for r in rows if r["benchmark"] == benchmark]
        out += [
            f"## {benchmark}: what each method is",
            "",
            _method_table(own),
            "",
            *_method_notes(),
            "",
        ]
        out += [
            "### One update of the student",
            "",
            _update_table(own),
            "",
            *_update_notes(own),
            "",
        ]
        out += [
            "### What the budget buys",
            "",
            _budget_table(own),
            "",
            *_budget_notes(own, sources[0]),
            "",
        ]
        parts = [r for r in quality if r["benchmark"] == benchmark]
        out += [
            "### Time to quality",
            "",
            _quality_table(parts),
            "",
            *_quality_notes(parts, sources[1]),
            "",
        ]
    return "\n".join(out).rstrip() + "\n"


def _method_notes() -> list[str]:
    return [
        "‘trains’: what the optimisers move, by player; a head is a small network on features. ‘params’: of the student as it is sampled; "
        "‘all trained’: of every network with an optimiser, weight averages not counted. Every method gets noise and, where the data "
        "have classes, labels. NFE: what its sampler supports, the headline in bold.",
    ]


def _update_notes(rows: list[Row]) -> list[str]:
    wrong = [f"{r['title']}: {words}" for r in rows for words in r.get("disagreements", [])]
    undeclared = [r["title"] for r in rows if "calls" in r and not r.get("flops_minimum")]
    lines = [
        "Calls and, in brackets, rows of evaluations, averaged over one cycle and divided by the student’s updates in it; gradients are "
        "not counted as calls. MFLOP: metered, everything that `train_step` computed in products of matrices and convolutions (a "
        "multiplication and an addition each), backward passes included, set-up not. Minimum: rows times FLOPs of one evaluation of that "
        "network, for the evaluations that the arm’s algorithm needs (`cost` in the method’s config.yaml): forward; as much again for a "
        "tangent; backward about twice that into weights, and as far as the network’s own layers lie on the way through inputs alone. "
        "Ratio: metered over minimum, above 1 by what an implementation computes beyond it.",
    ]
    if any((r.get("ratio") or 1) < 0.99 for r in rows):
        lines += [
            "",
            "Below 1: a teacher in closed form is charged as a network for its values, and nothing for a gradient through it.",
        ]
    if undeclared:
        lines += [
            "",
            f"No declared cost, or a network whose FLOPs are not known in closed form: {', '.join(undeclared)}.",
        ]
    if wrong:
        lines += ["", f"**Counts that differ from the declared ones:** {'; '.join(wrong)}."]
    return lines


def _budget_notes(rows: list[Row], source: str) -> list[str]:
    found = sorted({m for r in rows for m in r.get("hardware", [])})
    return [
        f"From the records of [{source}]({source}.md). TFLOP: what a run may spend; a method from scratch has the teacher’s on top. "
        "Set-up: regression pairs, training of frozen features, the arm it starts from. Seconds: of the whole run, set-up, metering and "
        f"sampling included, over the student’s updates, mean over seeds, on {'; '.join(found) or MISSING}: they are of that machine, "
        "which other runs shared. Peak memory: of the process, libraries included, largest over seeds.",
    ]


def _quality_notes(rows: list[Row], source: str) -> list[str]:
    if not rows:
        return ["No run with another share of the budget is published."]
    found = sorted({m for r in rows for m in r["hardware"]})
    return [
        f"At the headline NFE, from the records of `{source}`: mean ± sample sd over the seeds there are, seconds of the whole run and of "
        f"its start, on {'; '.join(found)}, number of seeds; — where not run. All settings are those of the full budget: schedules and "
        "averages are shares of it.",
    ]


def write(
    name: str,
    title: str,
    records: list[Record],
    budgets: list[Record],
    anatomies: dict[tuple[str, str], Row],
    sources: tuple[str, str],
    appendix: list[str],
    folder: Path,
    write_bytes: Callable[[Path, bytes], None],
) -> None:
    """The three twins of the table of costs into `folder`: costs of the arms of `records`, qualities of `budgets`, an appendix."""
    rows, quality = cost_rows(records, anatomies), quality_rows(budgets)
    text = lambda v: (
        v
        if v is None or isinstance(v, str | int | float)
        else json.dumps(_rounded(v), ensure_ascii=False)
    )
    flat = [{key: text(value) for key, value in r.items()} for r in rows]
    content = {"sources": list(sources), "rows": _rounded(rows), "time_to_quality": quality}
    twins = {
        "md": (
            markdown(title, rows, quality, sources) + "".join(f"{line}\n" for line in appendix)
        ).encode(),
        "json": (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(),
        "csv": pd.DataFrame(_rounded(flat)).to_csv(index=False).encode(),
    }
    for suffix, data in twins.items():
        write_bytes(folder / f"{name}.{suffix}", data)


def _rounded(value: Any) -> Any:
    """Floats with 8 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
