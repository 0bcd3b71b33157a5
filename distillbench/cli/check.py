"""What the command line does with samples: score those of an arm, of repeated draws, and those made elsewhere.

Beside `cli.py` the only module that may import eval.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.cells.progress import reporter
from distillbench.errors import UserError

if TYPE_CHECKING:
    pass
from distillbench.cli.evaluate import known_metrics, out


def check_method(target: str) -> bool:
    """Print what `distillbench check` finds, stage by stage; whether nothing was found."""
    import time

    import torch

    from distillbench.conformance import check
    from distillbench.registry import folders
    from eval.metrics.mixtures import sliced_wasserstein

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a check runs on the CPU
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if "@" in target:
        raise UserError(
            f"check {target}: a method is checked with all of its variants: leave @{target.partition('@')[2]} out"
        )
    if "/" in target or (Path(target) / "method.py").is_file():
        path = Path(target).resolve()
        if not (path / "method.py").is_file():
            raise UserError(
                f"check {target}: no method.py there: name a method, or the folder that holds one"
            )
        folder = folders.read_folder(path)
    else:
        folder = folders.arm(target).folder
    start, bad = time.monotonic(), 0
    for about, findings in check.examine(
        folder, sliced_wasserstein, known_metrics, reporter(f"check {folder.name}")
    ):
        out.print(f"{'FAILED' if findings else 'ok    '}  {about}", soft_wrap=True, markup=False)
        for finding in findings:
            out.print(f"  {finding}", soft_wrap=True, markup=False)
        bad += len(findings)
    verdict = f"{bad} finding{'s' if bad > 1 else ''}" if bad else "keeps the contract"
    out.print(f"{folder.name}: {verdict}, {time.monotonic() - start:.0f} s", soft_wrap=True)
    return not bad
