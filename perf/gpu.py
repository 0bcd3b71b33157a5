"""What a train step of every method costs at image scale on one GPU: milliseconds, memory, network evaluations, by precision.

On a machine with a GPU, from the root of the checkout (a few minutes; needs torch, numpy, pydantic, pyyaml, safetensors, pytest):

    python -m pytest tests/test_cuda.py -rs; python -m perf.gpu --output DIR

writes DIR/gpu.json after every row and DIR/gpu.md, the table. Without a GPU `python -m perf.gpu --output DIR --tiny` shows that it runs.

Each method's default arm, or those named by --arms, with the settings for digits, but a DiT-B/2 on latents of 4x32x32, 1000 classes and
a batch of B; its teacher has random weights, its images, labels and regression pairs are random numbers (nothing is solved or trained
beforehand). `flow matching` is the training of the teacher itself, the unit of the ratios. A cycle is the number of train steps after
which a method's pattern of updates repeats; three cycles warm up, the median of five counts. No torch.compile, no CUDA graphs, no
activation checkpointing.

- tf32: float32 with torch.set_float32_matmul_precision("high"), as is usual in the field; cuDNN's convolutions as well.
- bf16: the same under autocast to bfloat16, the whole train step; casts of weights are not cached, because weights move inside it.
- fp32: float32 throughout, which is what the suite's own cells use.

What runs a forward derivative through the network refuses autocast: its row says `fp32 only`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import config, features
from distillbench.meter import Meter
from distillbench.method import Batch, Condition, Method, Needs, Step, Task, Teacher
from distillbench.networks.dit import SIZES, DiT
from distillbench.registry import folders
from distillbench.registry.folders import Arm, MethodFolder
from distillbench.seeds import derive
from distillbench.teachers.trained import TeacherConfig, TeacherTraining

BENCHMARK = "digits"  # whose settings the methods take
BASELINE = "flow matching"
PRECISIONS = {
    "tf32": "float32, matmul precision 'high' (TF32)",
    "bf16": "autocast to bfloat16, no cache of casts",
    "fp32": "float32, matmul precision 'highest', no TF32",
}
ROW_SECONDS = 25.0  # of timed cycles, at most; one at least


@dataclass(frozen=True)
class Scale:
    """Data, network and how long to measure."""

    shape: tuple[int, ...]
    classes: int
    network: dict[str, int]
    batch: int
    warm: int
    timed: int


FULL = Scale((4, 32, 32), 1000, SIZES["B/2"], 32, 3, 5)
TINY = Scale((4, 8, 8), 10, {"width": 16, "depth": 2, "heads": 2, "patch": 2}, 8, 1, 2)


@dataclass
class Built:
    """A method ready to step."""

    method: Method
    needs: Needs
    task: Task
    meter: Meter
    batch: Batch


def settings(arm: Arm, batch: int) -> Arm:
    """The arm with every size of a batch among its settings set to `batch`."""
    raw = arm.settings(config.benchmark(BENCHMARK))
    return replace(
        arm, changes={key: batch for key in raw if key == "batch" or key.endswith("_batch")}
    )


def configured(arm: Arm | None, batch: int) -> tuple[type[Method], Any]:
    """Class and settings of an arm; None is the teacher's own training."""
    benchmark = config.benchmark(BENCHMARK)
    if arm is None:
        return TeacherTraining, TeacherConfig(
            **benchmark.teacher.model_dump() | {"batch": batch}, guidance=benchmark.guidance
        )
    cls = folders.load(arm.folder)
    return cls, folders.configuration(settings(arm, batch), benchmark, cls)


def build(arm: Arm | None, scale: Scale, batch: int, device: torch.device) -> Built:
    """A method on a random teacher, with random data that stay the same over all steps."""
    cls, settings_ = configured(arm, batch)
    needs, meter = cls.needs(settings_), Meter()

    def make(*args: Any, **options: Any) -> DiT:
        with device:  # 130M weights are drawn there: on the CPU it takes seconds for each network
            return DiT(*args, **options)

    torch.manual_seed(0)
    weights: DiT | None = None
    if needs.teacher:
        weights = make(scale.shape, scale.classes, **scale.network)
        for p in weights.parameters():
            nn.init.normal_(p, std=0.02)  # all of them: a new network is zero
        meter.watch(weights, lambda: "teacher")
    teacher = None if weights is None else Teacher(weights, scale.classes)
    frozen: nn.Module | None = None
    if needs.features is not None:
        frozen = features.untrained(scale.shape).requires_grad_(False).to(device)
        meter.watch(frozen, lambda: "features")
    start: dict[str, Tensor] | None = None
    if arm is not None and arm.start is not None:  # a student of that arm, as new
        start = (
            build(arm.start, scale, batch, device).task.players["student"].networks[0].state_dict()
        )
    task = Task(
        scale.shape,
        scale.classes,
        scale.network,
        teacher,
        weights,
        0,
        device,
        meter,
        frozen,
        start,
        make=make,
    )
    torch.manual_seed(derive(0, "build"))
    method = cls(task, settings_)
    for player in task.players.values():
        player.total_updates = 1000
    return Built(method, needs, task, meter, random_batch(needs, scale, device))


def random_batch(needs: Needs, scale: Scale, device: torch.device) -> Batch:
    """What the needs name: standard normal images, uniform labels, no guidance."""
    rng = torch.Generator().manual_seed(1)
    normal = lambda n: torch.randn(n, *scale.shape, generator=rng).to(device)
    cond = lambda n: Condition(torch.randint(scale.classes, (n,), generator=rng).to(device))
    pairs = None
    if needs.pairs is not None:
        n = needs.pairs.batch
        pairs = normal(n), normal(n), cond(n)
    return Batch(needs.batch, cond(needs.batch), normal(needs.batch) if needs.data else None, pairs)


def one_cycle(built: Built, device: torch.device) -> None:
    for i in range(built.needs.cycle):
        step = Step(i, built.needs.cycle, 0, device)
        torch.manual_seed(derive(0, "global", i))
        built.method.train_step(built.batch, step)


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """The block runs in one of PRECISIONS."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    try:
        with (
            torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            if name == "bf16"
            else contextlib.nullcontext()
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def synchronised(device: torch.device) -> float:
    """Seconds now, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free(device: torch.device) -> None:
    """Give back what the last method held: hooks and tasks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gib(bytes_: float) -> float:
    return round(bytes_ / 2**30, 3)


def measured(
    arm: Arm | None, name: str, scale: Scale, batch: int, device: torch.device
) -> dict[str, Any]:
    """One row: costs of a cycle of an arm in precision `name`."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    built = build(arm, scale, batch, device)
    row: dict[str, Any] = {
        "batch": batch,
        "rows_per_step": built.needs.batch,
        "cycle": built.needs.cycle,
    }
    row["million_parameters"] = {
        n: round(sum(p.numel() for p in player.parameters) / 1e6, 3)
        for n, player in built.task.players.items()
    }  # trained ones
    with precision(name, device):
        if failure := flops_error(
            built, device
        ):  # of the counter or of the method: without the counter it shows
            row["flops"] = failure
            with built.meter.counting():
                one_cycle(built, device)
        else:
            row["tflop_per_cycle"] = round(built.meter.flops / 1e12, 6)
        updates = {n: built.meter.calls[f"{n}.backward"] for n in built.task.players}
        rows = {
            role: n
            for role, n in sorted(built.meter.rows.items())
            if not role.endswith(".backward")
        }
        row |= {
            "updates_per_cycle": updates,
            "evaluated_rows_per_cycle": rows,
            "calls_per_cycle": dict(sorted(built.meter.calls.items())),
        }
        for _ in range(scale.warm - 1):
            one_cycle(built, device)
        if cuda:
            synchronised(device)
            row["resident_gib"] = gib(
                torch.cuda.memory_allocated(device) - before
            )  # networks, averages, moments, data
            torch.cuda.reset_peak_memory_stats(device)
        seconds: list[float] = []
        while len(seconds) < scale.timed and (not seconds or sum(seconds) < ROW_SECONDS):
            start = synchronised(device)
            one_cycle(built, device)
            seconds.append(synchronised(device) - start)
        if cuda:
            row["peak_gib"] = gib(torch.cuda.max_memory_allocated(device) - before)
            row["reserved_gib"] = gib(torch.cuda.max_memory_reserved(device))
    cycle = statistics.median(seconds)
    moved = next((updates[n] for n in ("student", "teacher") if n in updates), 0)
    row["cycle_ms"] = [round(1e3 * s, 3) for s in seconds]
    row["ms_per_step"] = round(1e3 * cycle / built.needs.cycle, 3)
    row["ms_per_student_update"] = round(1e3 * cycle / moved, 3) if moved else None
    if "tflop_per_cycle" in row:
        row["tflop_per_second"] = round(row["tflop_per_cycle"] / cycle, 3)
    return row


def flops_error(built: Built, device: torch.device) -> str | None:
    """One cycle with FLOPs counted; what went wrong, with the counts of evaluations set back."""
    try:
        with built.meter.measured():
            one_cycle(built, device)
        return None
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        built.meter.calls.clear()
        built.meter.rows.clear()
        return f"not counted: {one_line(e)}"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def attempted(arm: Arm | None, name: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """`measured` at the largest batch that fits, halved from the scale's; whatever is raised becomes the row's status."""
    batch = scale.batch
    while True:
        try:
            return {"status": "measured", **measured(arm, name, scale, batch, device)}
        except torch.OutOfMemoryError as e:
            failure = {"status": f"out of memory at batch {batch}", "error": one_line(e)}
        except Exception as e:
            if (
                name == "bf16"
                and isinstance(e, RuntimeError)
                and "float32: leave autocast" in str(e)
            ):
                return {"status": "fp32 only", "error": one_line(e)}
            return {
                "status": "failed",
                "error": one_line(e),
                "traceback": traceback.format_exc()[-3000:],
            }
        # Outside the handler, where nothing holds the frames that hold the tensors.
        free(device)
        batch //= 2
        if batch < 4:
            return failure


def folders() -> tuple[dict[str, MethodFolder], dict[str, str]]:
    """Method folders by name; and what is wrong with those that cannot be read."""
    try:
        return folders.discover(), {}
    except Exception as e:
        print(f"discovery: {one_line(e)}; taking the folders one by one", flush=True)
    found, broken = {}, {}
    for path in sorted(p.parent for p in (config.root() / "methods").glob("*/method.py")):
        try:
            found[path.name] = folders.read_folder(path)
        except Exception as e:
            broken[path.name] = one_line(e)
    return found, broken


def environment(device: torch.device) -> dict[str, Any]:
    out: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.machine(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        out |= {
            "device": about.name,
            "memory_gib": gib(about.total_memory),
            "cuda": torch.version.cuda,
        }
        out["cudnn"] = torch.backends.cudnn.version()
    return out


def written(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    os.replace(part, path)


def cell(row: dict[str, Any] | None, key: str) -> str:
    if row is None:
        return "–"
    if row["status"] != "measured":
        return row["status"] if key == "ms_per_step" else "–"
    value = row.get(key)
    return "–" if value is None else f"{value:.1f}"


def evaluations(row: dict[str, Any]) -> str:
    """Rows that each network sees in a train step, in units of the batch, forward; `.tangent`: with a derivative."""
    per = row["batch"] * row["cycle"]
    return ", ".join(f"{role} {n / per:.3g}" for role, n in row["evaluated_rows_per_cycle"].items())


def table(result: dict[str, Any]) -> str:
    """The results as markdown, methods as rows."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        rows.setdefault(row["method"], {})[row["precision"]] = row
    names, env, scale = result["precisions"], result["environment"], result["scale"]
    about = ", ".join(f"{key} {value}" for key, value in scale["network"].items())
    kept = "".join(f"- {name}: {text}\n" for name, text in names.items())
    lines = [
        "# Train steps at image scale\n",
        f"`python -m perf.gpu` on {', '.join(f'{k} {v}' for k, v in env.items())}.\n",
        f"Transformer ({about}) on {'x'.join(map(str, scale['shape']))}, {scale['classes']} classes, batch {scale['batch']}; one GPU, "
        f"eager; median of {scale['timed']} cycles after {scale['warm']}.\n\n{kept}",
        "Milliseconds per train step (ratio to flow matching's), per update of the student, and peak memory in GiB.\n",
    ]
    head = ["method", "steps in a cycle"] + [
        f"{n} {what}" for n in names for what in ("ms/step", "ms/student update", "peak GiB")
    ]
    lines += ["| " + " | ".join(head) + " |\n", "|---" * len(head) + "|\n"]
    for method, own in rows.items():
        known = next((row for row in own.values() if row["status"] == "measured"), None)
        cells = [method, "–" if known is None else str(known["cycle"])]
        for name in names:
            row, base = own.get(name), rows.get(BASELINE, {}).get(name)
            step = cell(row, "ms_per_step")
            if row and base and row["status"] == base["status"] == "measured":
                step += f" ({row['ms_per_step'] / base['ms_per_step']:.2f})"
                step += f" at batch {row['batch']}" if row["batch"] != scale["batch"] else ""
            cells += [step, cell(row, "ms_per_student_update"), cell(row, "peak_gib")]
        lines.append("| " + " | ".join(cells) + " |\n")
    lines += [
        "\n| method | parameters trained, million | updates in a cycle | rows evaluated in a step / batch | TFLOP/step |\n",
        "|---" * 5 + "|\n",
    ]
    for method, own in rows.items():
        known = next((row for row in own.values() if row["status"] == "measured"), None)
        if known is not None:
            parameters, updates = (
                ", ".join(f"{k} {v:g}" for k, v in known[key].items())
                for key in ("million_parameters", "updates_per_cycle")
            )
            flops = (
                f"{known['tflop_per_cycle'] / known['cycle']:.3g}"
                if "tflop_per_cycle" in known
                else "–"
            )
            lines.append(
                f"| {method} | {parameters} | {updates} | {evaluations(known)} | {flops} |\n"
            )
    failures = [row for row in result["rows"] if "error" in row and row["status"] != "fp32 only"]
    lines += (
        [
            "\n"
            + "".join(
                f"- {row['method']}, {row['precision']}: {row['status']}: {row['error']}\n"
                for row in failures
            )
        ]
        if failures
        else []
    )
    return (
        "\n".join(part.rstrip("\n") if part.startswith(("|", "\n|")) else part for part in lines)
        + "\n"
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m perf.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument(
        "--tiny", action="store_true", help="a small transformer, for machines without a GPU"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="in this order",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        help="method or method@variant; by default all methods that are discovered",
    )
    parser.add_argument("--batch", type=int, help=f"instead of {FULL.batch}")
    parser.add_argument("--seconds", type=float, default=210, help="no row is begun after so long")
    given = parser.parse_args(arguments)
    begun = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        parser.error("no GPU is available: --tiny shows that it runs")
    scale = TINY if given.tiny else FULL
    scale = scale if given.batch is None else replace(scale, batch=given.batch)
    found, broken = folders()
    chosen = (
        {n: folders.arm(n) for n in given.arms}
        if given.arms
        else {n: Arm(f, None) for n, f in found.items()}
    )
    arms: dict[str, Arm | None] = {BASELINE: None} | chosen
    given.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "environment": environment(device),
        "scale": asdict(scale),
        "precisions": {name: PRECISIONS[name] for name in given.precisions},
        "rows": [
            {"method": n, "precision": "any", "status": "unreadable", "error": e}
            for n, e in broken.items()
        ],
    }
    for name in (
        given.precisions
    ):  # all methods in one precision first: what time leaves out is a precision, not a method
        for method, arm in arms.items():
            started = time.perf_counter()
            late = started - begun > given.seconds
            row = (
                {"status": "not begun: no time left"}
                if late
                else attempted(arm, name, scale, device)
            )
            if not late:
                free(device)
            result["rows"].append(
                {
                    "method": method,
                    "precision": name,
                    **row,
                    "seconds": round(time.perf_counter() - started, 2),
                }
            )
            what = (
                f"{row['ms_per_step']:.1f} ms/step"
                if row["status"] == "measured"
                else f"{row['status']} {row.get('error', '')}"
            )
            print(f"{time.perf_counter() - begun:6.1f} s  {name}  {method}: {what}", flush=True)
            if "traceback" in row:
                print(row["traceback"], flush=True)
            written(given.output / "gpu.json", json.dumps(result, indent=1) + "\n")
            try:
                written(given.output / "gpu.md", table(result))
            except Exception:
                traceback.print_exc()
    return result


if __name__ == "__main__":
    main()
