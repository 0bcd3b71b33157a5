"""results/table1.md, .csv and .json: what each method is and what it costs, a pure function of
published records and of what the methods' folders say (`distillbench/conformance/anatomy.py`,
handed in as plain dictionaries).

A declared cost (`cost` in config.yaml) lists the evaluations of one cycle as the paper's algorithm
needs them. It is compared with what the meter saw (`disagreements`), and gives the algorithmic
minimum: rows times FLOPs of one evaluation of that network, forward and, as declared, backward. A
tangent counts as a forward evaluation.
"""

from __future__ import annotations

import json
import re
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from eval import catalogue
from eval.catalogue import MISSING
from eval.report import text
from eval.report.records import Record, arm_name, grouped
from eval.report.rows import Row, fidelity_words, summarise, titled

SHARES = (0.25, 1.0, 4.0)  # of the budget, shown in any case
# the end of a variant's name where another share of the budget was spent
SHARE = re.compile(r"(?:^|@)x[0-9.]+$")
NOT_RUN = "—"
# keys of an anatomy's `needs` that have words of their own, or none
KNOWN_NEEDS = {"batch", "cycle", "data", "features", "headline_nfe", "nfe", "pairs", "teacher"}


class Calls(NamedTuple):
    """Evaluations of one role in one cycle: how often, and rows in units of the batch."""

    calls: int
    rows: float


def per_cycle(record: Record) -> tuple[float, float]:
    """(cycles of updates of the run, rows of a batch)."""
    cost = record.result["cost"]
    cycles = cost["updates"]["student"] / cost["calls_per_cycle"]["student.backward"]
    return cycles, cost["images"] / cost["steps"]


def metered(record: Record, anatomy: Row) -> dict[str, Calls]:
    """Evaluations of one cycle by role, without set-up.

    Set-up rows are in the record's total. Those of the teacher are known (pairs by Heun steps of
    two evaluations); how many images the training of features saw is not, so that their rows
    cannot be told apart: self-supervised features have rows 0.
    """
    cost = record.result["cost"]
    cycles, batch = per_cycle(record)
    pairs = anatomy["needs"]["pairs"]
    of_pairs = pairs["count"] * pairs["heun_steps"] * 2 if pairs else 0
    found = {}
    for role, calls in cost["calls_per_cycle"].items():
        if role.endswith(".backward"):
            continue
        rows = cost["rows"][role] - (of_pairs if role == "teacher" else 0)
        found[role] = Calls(calls, rows / (cycles * batch))
    if "features" in found and anatomy["needs"]["features"] == "self_supervised":
        found["features"] = Calls(found["features"].calls, 0.0)
    return found


def declared(anatomy: Row, roles: list[str]) -> dict[str, list[Row]]:
    """Declared evaluations by role, over the metered `roles` too.

    Those of a player's further networks, where they are not declared by themselves, are those of
    its first.
    """
    own = grouped(anatomy["cost"] or [], itemgetter("role"))
    for role in roles:
        first, _, number = role.rpartition(".")
        if role not in own and number.isdigit() and first in own:
            own[role] = own[first]
    return own


def disagreements(record: Record, anatomy: Row) -> list[str]:
    """Roles whose declared calls or rows are not those of the meter, in words.

    Empty where no cost is declared.
    """
    if anatomy["cost"] is None:
        return []
    seen = metered(record, anatomy)
    own = declared(anatomy, list(seen))
    out = []
    for role in sorted({*own, *seen}):
        entries = own.get(role, [])
        calls = sum(entry["calls"] for entry in entries)
        rows = [entry["rows"] for entry in entries]
        got = seen.get(role, Calls(0, 0.0))
        unknown = None in rows
        known = got.rows and not unknown
        off = known and abs(sum(rows) - got.rows) > 0.01 * got.rows
        if calls != got.calls or off:
            words = "as many" if unknown else f"{sum(rows):g}"
            out.append(
                f"{role}: declared {calls} calls of {words} batches in a cycle, "
                f"metered {got.calls} of {got.rows:.4g}"
            )
    return out


def minimum(record: Record, anatomy: Row) -> float | None:
    """FLOPs of a cycle that the declared evaluations need at least.

    None where a cost or a network's FLOPs are not known.
    """
    seen = metered(record, anatomy)
    _, batch = per_cycle(record)
    total = 0.0
    for role, entries in declared(anatomy, list(seen)).items():
        network = anatomy["networks"].get(role.removesuffix(".tangent"))
        if network is None or network["flops"] is None:
            return None
        for entry in entries:
            rows = entry["rows"] or 0
            if entry["rows"] is None and role in seen:
                rows = seen[role].rows
            total += rows * batch * _flops(entry, network)
    return total or None


def _flops(entry: Row, network: Row) -> float:
    """FLOPs of one declared evaluation of one row."""
    flops = network["flops"]
    if entry["blocks"] is not None:
        last = min(entry["blocks"], len(network["blocks"]))
        flops = network["blocks"][last - 1]
    backward = 0 if entry["gradient"] == "none" else flops[entry["gradient"]]
    return flops["forward"] + backward


def cost_rows(records: list[Record], anatomies: dict[tuple[str, str], Row]) -> list[Row]:
    """One row for each (benchmark, arm) of a method in `records`, by benchmark and name.

    A failed arm says so and has no counts.
    """
    students = [r for r in records if r.group != "teacher"]
    arms = grouped(students, attrgetter("benchmark", "arm"))
    missing = {"error": "not in this checkout"}
    return [_row(own, anatomies.get(arm, missing)) for arm, own in sorted(arms.items())]


def _row(own: list[Record], anatomy: Row) -> Row:
    first = own[0].result
    done = [r for r in own if r.status == "done"]
    row: Row = {
        "benchmark": first["benchmark"],
        "method": first["method"],
        "variant": first["variant"],
        "group": first["group"],
        "title": titled(first["title"], first["variant"]),
        "fidelity": first["fidelity"],
        "adaptation": first["adaptation"],
        "start": first.get("start"),
        "status": "done" if done else first["reason"],
        "seeds": len(done),
        "error": anatomy.get("error"),
    }
    built = "error" not in anatomy
    if built:
        row |= _trained(anatomy)
    if done:
        row |= _counts(done)
    if done and built:
        row |= _against_minimum(done[0], anatomy)
    return row


def _trained(anatomy: Row) -> Row:
    """Players with their networks, needs, and parameters of every network, each counted once."""
    params = {}
    players: dict[str, list[Row]] = {}
    for name, networks in anatomy["players"].items():
        players[name] = []
        for network in networks:
            params[network["role"]] = network["params"]
            players[name].append({key: network[key] for key in ("role", "kind", "params")})
    return {
        "players": players,
        "needs": anatomy["needs"],
        "params_trained": sum(params.values()),
    }


def _flops_of_update(record: Record) -> float:
    """Metered FLOPs of one update of the student, without set-up."""
    cost = record.result["cost"]
    return float((cost["flops"] - cost["setup_flops"]) / cost["updates"]["student"])


def _seconds_of_update(record: Record) -> float:
    cost = record.result["cost"]
    return float(cost["seconds"] / cost["updates"]["student"])


def _counts(done: list[Record]) -> Row:
    """What the records of an arm's finished seeds say.

    Calls and rows are per update of the student; `rows` includes those of set-up.
    """
    result = done[0].result
    cost = result["cost"]
    updates = cost["updates"]["student"]
    calls = cost["calls_per_cycle"]
    return {
        "nfe": result["nfe"],
        "headline_nfe": result["headline_nfe"],
        "params": result["params"],
        "batch": cost["images"] / cost["steps"],
        "updates": cost["updates"],
        "calls": {role: n / calls["student.backward"] for role, n in calls.items()},
        "rows": {role: n / updates for role, n in cost["rows"].items()},
        "flops_update": _flops_of_update(done[0]),
        "setup_flops": cost["setup_flops"],
        "budget_flops": cost["limit_flops"],
        "memory_mb": max(r.result["cost"]["peak_memory_mb"] for r in done),
        "seconds_update": summarise(map(_seconds_of_update, done))[0],
        "hardware": machines(done),
    }


def _against_minimum(record: Record, anatomy: Row) -> Row:
    """Rows per update without set-up, and the metered FLOPs beside the least that are needed."""
    least = minimum(record, anatomy)
    per_update = _flops_of_update(record)
    updates = record.result["cost"]["calls_per_cycle"]["student.backward"]
    _, batch = per_cycle(record)
    rows: dict[str, float | None] = {}
    for role, calls in metered(record, anatomy).items():
        rows[role] = calls.rows * batch / updates
    if rows.get("features") == 0:
        entries = declared(anatomy, ["features"]).get("features", [])
        declared_rows = sum(entry["rows"] or 0 for entry in entries)
        rows["features"] = declared_rows * batch / updates or None
    if least is not None:
        least /= updates
    return {
        "rows": rows,
        "flops_minimum": least,
        "ratio": None if least is None else per_update / least,
        "disagreements": disagreements(record, anatomy),
    }


def machines(records: list[Record]) -> list[str]:
    """Where these cells were trained: processor and threads, sorted."""
    found = set()
    for record in records:
        provenance = record.result["provenance"]
        threads = provenance["threads"]
        plural = "s" if threads != 1 else ""
        found.add(f"{provenance['hardware']}, {threads} thread{plural}")
    return sorted(found)


def _without_share(record: Record) -> tuple[str, str, float]:
    """(benchmark, arm without its share of the budget, share)."""
    variant = SHARE.sub("", record.result["variant"] or "")
    arm = arm_name(record.result["method"], variant)
    return record.benchmark, arm, float(record.result.get("budget_share", 1))


def quality_rows(records: list[Record]) -> list[Row]:
    """The main metric at the headline NFE by share of the budget.

    A row for each (benchmark, arm, share), sorted.
    """
    students = [r for r in records if r.group != "teacher"]
    arms = grouped(students, _without_share)
    return [_quality_row(arm, own) for arm, own in sorted(arms.items())]


def _quality_row(place: tuple[str, str, float], own: list[Record]) -> Row:
    benchmark, arm, share = place
    seconds = []
    values = []
    metric = catalogue.main_metric("images")
    for record in own:
        row = record.at(None)
        if row is not None:
            metric = catalogue.main_metric(catalogue.family_of(row))
            values.append(metric.value(row))
            cost = record.result["cost"]
            seconds.append(cost["seconds"] + cost.get("start", {}).get("seconds", 0))
    mean, sd = summarise(values)
    _, _, variant = arm.partition("@")
    return {
        "benchmark": benchmark,
        "arm": arm,
        "title": titled(own[0].result["title"], variant),
        "share": share,
        "metric": metric.name,
        "hardware": machines(own),
        "mean": mean,
        "sd": sd,
        "seeds": len(values),
        "seconds": summarise(seconds)[0],
        "failed": len(own) - len(values),
    }


def needs_words(row: Row) -> str:
    """What a method asks for, as a phrase."""
    needs = row["needs"]
    words = []
    if needs["teacher"]:
        words.append("teacher")
    if needs["data"]:
        words.append("real data")
    if needs["pairs"]:
        pairs = needs["pairs"]
        steps = pairs["heun_steps"]
        words.append(f"{pairs['count']:,} pairs of the teacher ({steps} Heun steps)")
    if needs["features"]:
        words.append(f"frozen features ({needs['features'].replace('_', '-')})")
    if row["start"]:
        words.append(f"finished {row['start']}")
    for key, value in needs.items():
        if key not in KNOWN_NEEDS and value not in (None, False):
            words.append(f"{key} {value}")
    return ", ".join(words) or "noise alone"


def trained_words(row: Row) -> str:
    """The players with their networks, as a phrase."""
    out = []
    for name, networks in row["players"].items():
        full = sum(network["kind"] == "velocity" for network in networks)
        heads = len(networks) - full
        some = "head" if heads == 1 else f"{heads} heads"
        if not heads:
            out.append(name)
        elif full:
            out.append(f"{name} + {some}")
        else:
            out.append(f"{name} ({some})")
    return ", ".join(out)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def evaluations(row: Row, roles: list[str]) -> str:
    """'2 (128)': calls and rows of one update of the student, by role where there are several.

    roles: those that are meant; what an arm does not call is left out.
    """
    parts = {}
    for role, calls in row["calls"].items():
        if role in roles and not role.endswith(".backward"):
            parts[role] = f"{_number(calls)} ({_number(row['rows'].get(role))})"
    if not parts:
        return MISSING
    distinct = set(parts.values())
    if len(parts) == 1:
        return distinct.pop()
    if len(distinct) == 1:
        return f"{len(parts)} × {distinct.pop()}"
    return ", ".join(f"{role} {words}" for role, words in parts.items())


def others(row: Row) -> list[str]:
    """Roles that are neither student, teacher nor features: critics, discriminators."""
    main = ("student", "teacher", "features")
    return [role for role in row["calls"] if role.partition(".")[0] not in main]


def _method_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        if "players" not in row or "nfe" not in row:
            why = text.escaped(row["error"] or row["status"])
            body.append([row["title"], why, *[MISSING] * 5])
            continue
        line = [row["title"], trained_words(row), needs_words(row)]
        line += [text.nfe_words(row["nfe"], row["headline_nfe"])]
        line += [text.millions(row["params"]), text.millions(row["params_trained"])]
        body.append([*line, fidelity_words(row) or MISSING])
    head = ["method", "trains", "needs", "NFE", "params", "all trained", "fidelity"]
    return text.table(head, body)


def _update_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        if "calls" not in row:
            continue
        updates = dict(row["updates"])
        of_student = updates.pop("student")
        of_others = [_number(n / of_student) for n in updates.values()]
        least = row.get("flops_minimum")
        line = [row["title"], _number(row["batch"])]
        for role in ("student", "student.tangent", "teacher"):
            line.append(evaluations(row, [role]))
        line += [evaluations(row, others(row)), ", ".join(of_others) or MISSING]
        line.append(evaluations(row, ["features"]))
        line.append(text.fixed(row["flops_update"] / 1e6, 0))
        line.append(text.fixed(None if least is None else least / 1e6, 0))
        line.append(text.fixed(row.get("ratio"), 3))
        body.append(line)
    roles = ["student", "tangent", "teacher", "critic, heads", "their updates", "features"]
    return text.table(["method", "batch", *roles, "MFLOP", "minimum", "ratio"], body)


def _budget_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        if "calls" in row:
            line = [row["title"], text.tera(row["budget_flops"])]
            line.append(text.tera(row["setup_flops"] or None))
            line += [f"{row['updates']['student']:,}", text.fixed(row["seconds_update"], 3)]
            body.append([*line, f"{row['memory_mb']} MiB", row["seeds"]])
    head = ["method", "TFLOP", "of it set-up", "student updates", "s / update", "peak memory", "n"]
    return text.table(head, body)


def _quality_table(rows: list[Row]) -> str:
    shares = sorted({*SHARES, *map(itemgetter("share"), rows)})
    metric = catalogue.metric(rows[0]["metric"]) if rows else catalogue.main_metric("images")
    columns = [f"{metric.column}, {share:g}× (s)" for share in shares]
    body = []
    for own in grouped(rows, itemgetter("arm")).values():
        by_share = {row["share"]: row for row in own}
        cells = [_quality(by_share.get(share)) for share in shares]
        body.append([own[0]["title"], *cells])
    return text.table(["method", *columns], body)


def _quality(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    if row["mean"] is None:
        return "failed"
    value = catalogue.metric(row["metric"]).printed(row["mean"], row["sd"])
    return f"{value} ({row['seconds']:.0f} s, n={row['seeds']})"


def markdown(title: str, rows: list[Row], quality: list[Row], sources: tuple[str, str]) -> str:
    """The page; `sources`: tables whose records stand behind the costs and behind the qualities."""
    qualities = grouped(quality, itemgetter("benchmark"))
    out = [f"# {title}", ""]
    for benchmark, own in grouped(rows, itemgetter("benchmark")).items():
        parts = qualities.get(benchmark, [])
        out += [f"## {benchmark}: what each method is", "", _method_table(own), ""]
        out += [*_method_notes(), ""]
        out += ["### One update of the student", "", _update_table(own), ""]
        out += [*_update_notes(own), ""]
        out += ["### What the budget buys", "", _budget_table(own), ""]
        out += [*_budget_notes(own, sources[0]), ""]
        out += ["### Time to quality", "", _quality_table(parts), ""]
        out += [*_quality_notes(parts, sources[1]), ""]
    return "\n".join(out).rstrip() + "\n"


def _method_notes() -> list[str]:
    return [
        "‘trains’: what the optimisers move, by player; a head is a small network on features. "
        "‘params’: of the student as it is sampled; ‘all trained’: of every network with an "
        "optimiser, weight averages not counted. Every method gets noise and, where the data have "
        "classes, labels. NFE: what its sampler supports, the headline in bold.",
    ]


def _update_notes(rows: list[Row]) -> list[str]:
    wrong = []
    undeclared = []
    for row in rows:
        for words in row.get("disagreements", []):
            wrong.append(f"{row['title']}: {words}")
        if "calls" in row and not row.get("flops_minimum"):
            undeclared.append(row["title"])
    lines = [
        "Calls and, in brackets, rows of evaluations, averaged over one cycle and divided by the "
        "student’s updates in it; gradients are not counted as calls. MFLOP: metered, everything "
        "that `train_step` computed in products of matrices and convolutions (a multiplication "
        "and an addition each), backward passes included, set-up not. Minimum: rows times FLOPs "
        "of one evaluation of that network, for the evaluations that the arm’s algorithm needs "
        "(`cost` in the method’s config.yaml): forward; as much again for a tangent; backward "
        "about twice that into weights, and as far as the network’s own layers lie on the way "
        "through inputs alone. Ratio: metered over minimum, above 1 by what an implementation "
        "computes beyond it.",
    ]
    if any((row.get("ratio") or 1) < 0.99 for row in rows):
        words = "a teacher in closed form is charged as a network for its values, and nothing"
        lines += ["", f"Below 1: {words} for a gradient through it."]
    if undeclared:
        words = "No declared cost, or a network whose FLOPs are not known in closed form"
        lines += ["", f"{words}: {', '.join(undeclared)}."]
    if wrong:
        lines += ["", f"**Counts that differ from the declared ones:** {'; '.join(wrong)}."]
    return lines


def _machines_of(rows: list[Row]) -> str:
    found = set()
    for row in rows:
        found.update(row.get("hardware", []))
    return "; ".join(sorted(found))


def _budget_notes(rows: list[Row], source: str) -> list[str]:
    return [
        f"From the records of [{source}]({source}.md). TFLOP: what a run may spend; a method from "
        "scratch has the teacher’s on top. Set-up: regression pairs, training of frozen features, "
        "the arm it starts from. Seconds: of the whole run, set-up, metering and sampling "
        "included, over the student’s updates, mean over seeds, on "
        f"{_machines_of(rows) or MISSING}: they are of that machine, which other runs shared. Peak "
        "memory: of the process, libraries included, largest over seeds.",
    ]


def _quality_notes(rows: list[Row], source: str) -> list[str]:
    if not rows:
        return ["No run with another share of the budget is published."]
    return [
        f"At the headline NFE, from the records of `{source}`: mean ± sample sd over the seeds "
        "there are, seconds of the whole run and of its start, on "
        f"{_machines_of(rows)}, number of seeds; {NOT_RUN} where not run. All settings are those "
        "of the full budget: schedules and averages are shares of it.",
    ]


def _flat(value: Any) -> Any:
    """A value as a cell of the CSV: JSON text of lists and dictionaries."""
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(text.rounded(value, 8), ensure_ascii=False)


def write(
    name: str,
    title: str,
    records: list[Record],
    budgets: list[Record],
    anatomies: dict[tuple[str, str], Row],
    sources: tuple[str, str],
    appendix: list[str],
    folder: Path,
    write_bytes: text.Write,
) -> None:
    """The three twins of the table of costs into `folder`.

    records: of the arms whose costs it shows; budgets: those of its qualities; appendix: lines.
    """
    rows = cost_rows(records, anatomies)
    quality = quality_rows(budgets)
    page = markdown(title, rows, quality, sources) + "".join(f"{line}\n" for line in appendix)
    content = {
        "sources": list(sources),
        "rows": text.rounded(rows, 8),
        "time_to_quality": quality,
    }
    flat = [{key: _flat(value) for key, value in row.items()} for row in rows]
    frame = pd.DataFrame(text.rounded(flat, 8))
    write_bytes(folder / f"{name}.md", page.encode())
    write_bytes(folder / f"{name}.json", text.json_bytes(content))
    write_bytes(folder / f"{name}.csv", frame.to_csv(index=False).encode())
