"""What a train step of every method costs at image scale on one GPU, by precision.

Milliseconds, memory, network evaluations. On a machine with a GPU, from the root of the checkout (a
few minutes; needs torch, numpy, pydantic, pyyaml, safetensors, pytest):

    python -m pytest tests/test_cuda.py -rs; python -m perf.gpu --output DIR

writes DIR/gpu.json after every row and DIR/gpu.md, the table. Without a GPU
`python -m perf.gpu --output DIR --tiny` shows that it runs.

Each method's default arm, or those named by --arms, with the settings for digits, but a DiT-B/2 on
latents of 4x32x32, 1000 classes and a batch of B; its teacher has random weights, its images,
labels and regression pairs are random numbers (nothing is solved or trained beforehand). `flow
matching` is the training of the teacher itself, the unit of the ratios. A cycle is the number of
train steps after which a method's pattern of updates repeats; three cycles warm up, the median of
five counts. No torch.compile, no CUDA graphs, no activation checkpointing.

- tf32: float32 with torch.set_float32_matmul_precision("high"), as is usual in the field; cuDNN's
  convolutions as well.
- bf16: the same under autocast to bfloat16, the whole train step; casts of weights are not cached,
  because weights move inside it.
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


FULL = Scale((4, 32, 32), 1000, SIZES["B/2"], batch=32, warm=3, timed=5)
TINY_NETWORK = {"width": 16, "depth": 2, "heads": 2, "patch": 2}
TINY = Scale((4, 8, 8), 10, TINY_NETWORK, batch=8, warm=1, timed=2)


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
    changes = {}
    for key in arm.settings(config.benchmark(BENCHMARK)):
        if key == "batch" or key.endswith("_batch"):
            changes[key] = batch
    return replace(arm, changes=changes)


def configured(arm: Arm | None, batch: int) -> tuple[type[Method], Any]:
    """Class and settings of an arm; None is the teacher's own training."""
    benchmark = config.benchmark(BENCHMARK)
    if arm is None:
        own = benchmark.teacher.model_dump() | {"batch": batch}
        return TeacherTraining, TeacherConfig(**own, guidance=benchmark.guidance)
    method_class = folders.load(arm.folder)
    resized = settings(arm, batch)
    return method_class, folders.configuration(resized, benchmark, method_class)


def build(arm: Arm | None, scale: Scale, batch: int, device: torch.device) -> Built:
    """A method on a random teacher, with random data that stay the same over all steps."""
    method_class, chosen = configured(arm, batch)
    needs = method_class.needs(chosen)
    meter = Meter()

    sizes: dict[str, Any] = dict(scale.network)

    def architecture(**options: Any) -> DiT:
        with device:  # 130M weights are drawn there: on the CPU it takes seconds for each network
            return DiT(scale.shape, scale.classes, **sizes, **options)

    torch.manual_seed(0)
    teacher: Teacher | None = None
    teacher_weights: dict[str, Tensor] | None = None
    if needs.teacher:
        network = architecture()
        for p in network.parameters():
            nn.init.normal_(p, std=0.02)  # all of them: a new network is zero
        meter.watch(network, lambda: "teacher")
        teacher = Teacher(network, scale.classes)
        teacher_weights = network.state_dict()
    frozen: nn.Module | None = None
    if needs.features is not None:
        frozen = features.untrained(scale.shape).requires_grad_(False).to(device)
        meter.watch(frozen, lambda: "features")
    start: dict[str, Tensor] | None = None
    if arm is not None and arm.start is not None:  # a student of that arm, as new
        started = build(arm.start, scale, batch, device)
        start = started.task.players["student"].networks[0].state_dict()
    task = Task(
        scale.shape,
        scale.classes,
        architecture,
        teacher,
        teacher_weights,
        0,
        device,
        meter,
        frozen,
        start,
    )
    torch.manual_seed(derive(0, "build"))
    method = method_class(task, chosen)
    for player in task.players.values():
        player.total_updates = 1000
    return Built(method, needs, task, meter, random_batch(needs, scale, device))


def random_batch(needs: Needs, scale: Scale, device: torch.device) -> Batch:
    """What the needs name: standard normal images, uniform labels, no guidance."""
    rng = torch.Generator().manual_seed(1)

    def normal(n: int) -> Tensor:
        return torch.randn(n, *scale.shape, generator=rng).to(device)

    def cond(n: int) -> Condition:
        return Condition(torch.randint(scale.classes, (n,), generator=rng).to(device))

    pairs: tuple[Tensor, Tensor, Condition] | None = None
    if needs.pairs is not None:
        n = needs.pairs.batch
        pairs = (normal(n), normal(n), cond(n))
    labels = cond(needs.batch)
    x = normal(needs.batch) if needs.data else None
    return Batch(needs.batch, labels, x, pairs)


def one_cycle(built: Built, device: torch.device) -> None:
    """The train steps of one cycle, with the same random numbers each time."""
    for i in range(built.needs.cycle):
        step = Step(i, built.needs.cycle, 0, device)
        torch.manual_seed(derive(0, "global", i))
        built.method.train_step(built.batch, step)


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """The block runs in one of PRECISIONS."""
    matmul = torch.get_float32_matmul_precision()
    convolution = torch.backends.cudnn.allow_tf32
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if name == "bf16":
        context = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    try:
        with context:
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


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
    """GiB, to three decimal places."""
    return round(bytes_ / 2**30, 3)


def measured(
    arm: Arm | None, name: str, scale: Scale, batch: int, device: torch.device
) -> dict[str, Any]:
    """One row of gpu.json: costs of a cycle of an arm in precision `name`."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    built = build(arm, scale, batch, device)
    row: dict[str, Any] = {
        "batch": batch,
        "rows_per_step": built.needs.batch,
        "cycle": built.needs.cycle,
        "million_parameters": trained_parameters(built),
    }
    with precision(name, device):
        row |= counted(built, device)
        for _ in range(scale.warm - 1):
            one_cycle(built, device)
        if cuda:
            synchronised(device)
            # Networks, averages, moments, data.
            row["resident_gib"] = gib(torch.cuda.memory_allocated(device) - before)
            torch.cuda.reset_peak_memory_stats(device)
        seconds = timed_cycles(built, scale, device)
        if cuda:
            row["peak_gib"] = gib(torch.cuda.max_memory_allocated(device) - before)
            row["reserved_gib"] = gib(torch.cuda.max_memory_reserved(device))
    cycle = statistics.median(seconds)
    updates = row["updates_per_cycle"]
    moved = updates.get("student", updates.get("teacher", 0))
    row["cycle_ms"] = [round(1e3 * s, 3) for s in seconds]
    row["ms_per_step"] = round(1e3 * cycle / built.needs.cycle, 3)
    row["ms_per_student_update"] = round(1e3 * cycle / moved, 3) if moved else None
    if "tflop_per_cycle" in row:
        row["tflop_per_second"] = round(row["tflop_per_cycle"] / cycle, 3)
    return row


def trained_parameters(built: Built) -> dict[str, float]:
    """Million weights that each player moves."""
    millions = {}
    for name, player in built.task.players.items():
        millions[name] = round(sum(p.numel() for p in player.parameters) / 1e6, 3)
    return millions


def counted(built: Built, device: torch.device) -> dict[str, Any]:
    """What one cycle evaluates, by network and player; run without FLOPs where they fail."""
    counts: dict[str, Any] = {}
    failure = flops_error(built, device)
    if failure is None:
        counts["tflop_per_cycle"] = round(built.meter.flops / 1e12, 6)
    else:  # of the counter or of the method: without the counter it shows
        counts["flops"] = failure
        with built.meter.counting():
            one_cycle(built, device)
    calls = built.meter.calls
    rows = {}
    for role, n in sorted(built.meter.rows.items()):
        if not role.endswith(".backward"):
            rows[role] = n
    counts["updates_per_cycle"] = {name: calls[f"{name}.backward"] for name in built.task.players}
    counts["evaluated_rows_per_cycle"] = rows
    counts["calls_per_cycle"] = dict(sorted(calls.items()))
    return counts


def timed_cycles(built: Built, scale: Scale, device: torch.device) -> list[float]:
    """Seconds of each timed cycle: as many as the scale says, or as ROW_SECONDS allow."""
    seconds: list[float] = []
    while len(seconds) < scale.timed and (not seconds or sum(seconds) < ROW_SECONDS):
        start = synchronised(device)
        one_cycle(built, device)
        seconds.append(synchronised(device) - start)
    return seconds


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
    """Type and message of an error, at most 300 characters."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:300]


def attempted(arm: Arm | None, name: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """`measured` at the largest batch that fits, halved from the scale's.

    Whatever is raised becomes the row's status.
    """
    batch = scale.batch
    while True:
        try:
            return {"status": "measured", **measured(arm, name, scale, batch, device)}
        except torch.OutOfMemoryError as e:
            failure = {"status": f"out of memory at batch {batch}", "error": one_line(e)}
        except Exception as e:
            refused = isinstance(e, RuntimeError) and "float32: leave autocast" in str(e)
            if name == "bf16" and refused:
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


def readable_folders() -> tuple[dict[str, MethodFolder], dict[str, str]]:
    """Method folders by name; and what is wrong with those that cannot be read."""
    try:
        return folders.discover(), {}
    except Exception as e:
        print(f"discovery: {one_line(e)}; taking the folders one by one", flush=True)
    readable: dict[str, MethodFolder] = {}
    broken: dict[str, str] = {}
    for file in sorted((config.root() / "methods").glob("*/method.py")):
        path = file.parent
        try:
            readable[path.name] = folders.read_folder(path)
        except Exception as e:
            broken[path.name] = one_line(e)
    return readable, broken


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device, as gpu.json has them."""
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.machine(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["memory_gib"] = gib(properties.total_memory)
        about["cuda"] = torch.version.cuda
        about["cudnn"] = torch.backends.cudnn.version()
    return about


def written(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def cell(row: dict[str, Any] | None, key: str) -> str:
    """One number of a row for the table; its status in place of the time where it has none."""
    if row is None:
        return "–"
    if row["status"] != "measured":
        return row["status"] if key == "ms_per_step" else "–"
    value = row.get(key)
    return "–" if value is None else f"{value:.1f}"


def evaluations(row: dict[str, Any]) -> str:
    """Rows that each network sees in a train step, in units of the batch, forward.

    `.tangent`: with a derivative.
    """
    per = row["batch"] * row["cycle"]
    return ", ".join(f"{role} {n / per:.3g}" for role, n in row["evaluated_rows_per_cycle"].items())


def listed(values: dict[str, float]) -> str:
    """Names with their numbers in one cell."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def markdown(cells: list[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


Rows = dict[str, dict[str, dict[str, Any]]]  # rows of gpu.json by method and precision


def any_measured(own: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The first row of a method that was measured; None without one."""
    for row in own.values():
        if row["status"] == "measured":
            return row
    return None


def times_table(rows: Rows, names: list[str], batch: int) -> list[str]:
    """Milliseconds and memory, methods as rows; `names`: the precisions."""
    head = ["method", "steps in a cycle"]
    for name in names:
        head += [f"{name} ms/step", f"{name} ms/student update", f"{name} peak GiB"]
    lines = [markdown(head), "|---" * len(head) + "|"]
    for method, own in rows.items():
        known = any_measured(own)
        cells = [method, "–" if known is None else str(known["cycle"])]
        for name in names:
            row = own.get(name)
            base = rows.get(BASELINE, {}).get(name)
            step = cell(row, "ms_per_step")
            if row and base and row["status"] == base["status"] == "measured":
                step += f" ({row['ms_per_step'] / base['ms_per_step']:.2f})"
                if row["batch"] != batch:
                    step += f" at batch {row['batch']}"
            cells += [step, cell(row, "ms_per_student_update"), cell(row, "peak_gib")]
        lines.append(markdown(cells))
    return lines


def counts_table(rows: Rows) -> list[str]:
    """What does not depend on the precision, methods as rows."""
    head = [
        "method",
        "parameters trained, million",
        "updates in a cycle",
        "rows evaluated in a step / batch",
        "TFLOP/step",
    ]
    lines = [markdown(head), "|---" * 5 + "|"]
    for method, own in rows.items():
        known = any_measured(own)
        if known is None:
            continue
        flops = "–"
        if "tflop_per_cycle" in known:
            flops = f"{known['tflop_per_cycle'] / known['cycle']:.3g}"
        parameters = listed(known["million_parameters"])
        updates = listed(known["updates_per_cycle"])
        lines.append(markdown([method, parameters, updates, evaluations(known), flops]))
    return lines


def table(result: dict[str, Any]) -> str:
    """The results as markdown."""
    rows: Rows = {}
    for row in result["rows"]:
        rows.setdefault(row["method"], {})[row["precision"]] = row
    names = result["precisions"]
    scale = result["scale"]
    machine = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    network = ", ".join(f"{key} {value}" for key, value in scale["network"].items())
    shape = "x".join(map(str, scale["shape"]))
    lines = [
        "# Train steps at image scale",
        "",
        f"`python -m perf.gpu` on {machine}.",
        "",
        f"Transformer ({network}) on {shape}, {scale['classes']} classes, batch {scale['batch']}; "
        f"one GPU, eager; median of {scale['timed']} cycles after {scale['warm']}.",
        "",
        *(f"- {name}: {text}" for name, text in names.items()),
        "",
        "Milliseconds per train step (ratio to flow matching's), per update of the student, "
        "and peak memory in GiB.",
        "",
        *times_table(rows, list(names), scale["batch"]),
        "",
        *counts_table(rows),
    ]
    failures = []
    for row in result["rows"]:
        if "error" in row and row["status"] != "fp32 only":
            where = f"{row['method']}, {row['precision']}"
            failures.append(f"- {where}: {row['status']}: {row['error']}")
    if failures:
        lines += ["", *failures, ""]
    return "\n".join(lines) + "\n"


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The command's words and the device; exits on a mistake."""
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.tiny:
        parser.error("no GPU is available: --tiny shows that it runs")
    return given, device


def chosen_arms(names: list[str] | None) -> tuple[dict[str, Arm | None], dict[str, str]]:
    """The baseline (None) and the arms by name, all methods by default; and unreadable folders."""
    arms: dict[str, Arm | None] = {BASELINE: None}
    readable, broken = readable_folders()
    if names:
        for name in names:
            arms[name] = folders.arm(name)
    else:
        for name, folder in readable.items():
            arms[name] = Arm(folder, None)
    return arms, broken


def summary(row: dict[str, Any]) -> str:
    """A row in a few words for the terminal."""
    if row["status"] == "measured":
        return f"{row['ms_per_step']:.1f} ms/step"
    return f"{row['status']} {row.get('error', '')}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure every arm in every precision; what is returned is gpu.json."""
    given, device = parsed(arguments)
    begun = time.perf_counter()
    scale = TINY if given.tiny else FULL
    if given.batch is not None:
        scale = replace(scale, batch=given.batch)
    arms, broken = chosen_arms(given.arms)
    given.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, error in broken.items():
        rows.append({"method": name, "precision": "any", "status": "unreadable", "error": error})
    result: dict[str, Any] = {
        "environment": environment(device),
        "scale": asdict(scale),
        "precisions": {name: PRECISIONS[name] for name in given.precisions},
        "rows": rows,
    }
    # All methods in one precision first: what time leaves out is a precision, not a method.
    for name in given.precisions:
        for method, arm in arms.items():
            started = time.perf_counter()
            row: dict[str, Any] = {"status": "not begun: no time left"}
            if started - begun <= given.seconds:
                row = attempted(arm, name, scale, device)
                free(device)
            seconds = round(time.perf_counter() - started, 2)
            rows.append({"method": method, "precision": name, **row, "seconds": seconds})
            passed = time.perf_counter() - begun
            print(f"{passed:6.1f} s  {name}  {method}: {summary(row)}", flush=True)
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
