"""`distillbench check`: what `conformance` finds wrong with a method, stage by stage."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from distillbench.cells.progress import reporter
from distillbench.cli.evaluate import known_metrics
from distillbench.cli.options import out
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.registry.folders import MethodFolder


def check(
    target: Annotated[str, typer.Argument(help="a method's name, or the path of its folder")],
) -> None:
    """Does a method keep the contract? A line for each promise that it breaks; exit code 1 if there
    is one.

    Files: imports, the README's equation table, claims, settings on every benchmark. Runs: every
    arm trains a cycle and samples at every NFE it declares, on images and on a mixture; then 200
    steps on the mixture, where cost, streams of random numbers, the use of what `needs` declares,
    the teacher, progress towards it, a repeated and a resumed run are looked at. Less than a minute
    on one core.
    """
    import torch

    from distillbench.conformance import check as conformance
    from eval.metrics.mixtures import sliced_wasserstein

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a check runs on the CPU
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    method = folder_of(target)
    began = time.monotonic()
    broken = 0
    report = reporter(f"check {method.name}")
    stages = conformance.examine(method, sliced_wasserstein, known_metrics, report)
    for about, findings in stages:
        out.print(f"{'FAILED' if findings else 'ok    '}  {about}", soft_wrap=True, markup=False)
        for finding in findings:
            out.print(f"  {finding}", soft_wrap=True, markup=False)
        broken += len(findings)
    result = "keeps the contract"
    if broken:
        result = f"{broken} finding{'s' if broken > 1 else ''}"
    out.print(f"{method.name}: {result}, {time.monotonic() - began:.0f} s", soft_wrap=True)
    if broken:
        raise typer.Exit(1)


def folder_of(target: str) -> MethodFolder:
    """The method that a name or a path names; UserError where there is none, or where it is an
    arm."""
    if "@" in target:
        variant = target.partition("@")[2]
        raise UserError(
            f"check {target}: a method is checked with all of its variants: leave @{variant} out"
        )
    is_path = "/" in target or (Path(target) / "method.py").is_file()
    if not is_path:
        return folders.arm(target).folder
    path = Path(target).resolve()
    if not (path / "method.py").is_file():
        raise UserError(
            f"check {target}: no method.py there: name a method, or the folder that holds one"
        )
    return folders.read_folder(path)
