"""Questions about the modules of methods, asked of a process of its own.

A foreign module may do anything to the process that imports it. `ask` runs a module of the suite
with `python -m`, whose `main` is `answer`; a process that ends early costs the question it was at,
and another one answers the rest. Imports no torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distillbench.errors import UserError

IMPORT_SECONDS = 60  # a module that takes longer to import does not import

Question = tuple[str, str]  # names of a benchmark and of an arm


@dataclass(frozen=True)
class Died:
    """The process of a question ended before it answered; code: as of a subprocess."""

    code: int

    def __str__(self) -> str:
        return f"its process ended with code {self.code}"


def ask(module: str, questions: list[Question]) -> list[Any]:
    """Answers of a module's `main` to all questions, in their order: JSON, or a `Died`.

    Raises UserError where a question was answered by one.
    """
    answers: list[Any] = []
    while len(answers) < len(questions):
        rest = questions[len(answers) :]
        words = [word for question in rest for word in question]
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for line in lines:
            if "error" in line:
                raise UserError(line["error"])
            answers.append(line["answer"])
        if len(lines) < len(rest):
            answers.append(Died(done.returncode))
    return answers


def answer(words: list[str], reply: Callable[[str, str], Any]) -> None:
    """Print `reply(benchmark, arm)` for each two words, a line of JSON each: the end of `ask`.

    A UserError is an answer; a reply that takes more than IMPORT_SECONDS ends the process.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a module prints is no answer
    for benchmark, arm in zip(words[::2], words[1::2], strict=True):
        faulthandler.dump_traceback_later(IMPORT_SECONDS, exit=True)
        try:
            line = {"answer": reply(benchmark, arm)}
        except UserError as e:
            line = {"error": str(e)}
        print(json.dumps(line), file=answers, flush=True)
