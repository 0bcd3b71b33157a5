"""Commands in tests are what they are outside: arguments, folder, streams, signals, exit code."""

from __future__ import annotations

import pytest

from tests.commands import zygote_environment
from tests.conftest import Checkout

pytestmark = pytest.mark.skipif(not zygote_environment(), reason="on Linux")


def test_a_command_is_the_same_with_and_without_the_zygote(checkout: Checkout):
    for words in (["list"], ["train", "tiny", "dmmd"], ["plan", "tiny", "--help"]):
        ours, real = (run("distillbench", *words) for run in (checkout.run, checkout.run_anew))
        assert (ours.returncode, ours.stdout, ours.stderr) == (
            real.returncode,
            real.stdout,
            real.stderr,
        )
        assert ours.stdout or ours.stderr
    done = checkout.run("bash", "-c", "distillbench list; python -m distillbench.cli lst; echo $?")
    assert done.stdout.endswith("\n2\n") and "dmd" in done.stdout and "lst" in done.stderr
