"""Anatomies of methods, each built in a process of its own. Imports no torch."""

from __future__ import annotations

from typing import Any

from distillbench.cells import isolated
from distillbench.cells.isolated import Died, Question

ANATOMY = "distillbench.conformance.anatomy"


def anatomies(wanted: list[Question]) -> dict[Question, dict[str, Any]]:
    """`anatomy` of every (benchmark, arm); {"error": why} for an arm that cannot be built.

    Raises UserError on a mistake in a benchmark's or a method's file.
    """
    answers: dict[Question, dict[str, Any]] = {}
    for question, answer in zip(wanted, isolated.ask(ANATOMY, wanted)):
        answers[question] = {"error": str(answer)} if isinstance(answer, Died) else answer
    return answers
