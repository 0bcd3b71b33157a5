"""Several ranks train one cell as one rank does, and end where one of them is lost.

design.md 'The interface'; workflow.md, section 3.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import Command
from tests.conftest import Checkout

WORLD = 2


def ranks(checkout: Checkout, arm: str, seed: int = 0) -> list[Command]:
    """The processes that train an arm of `tiny` together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    place = {
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = ("distillbench", "train", "tiny", arm, "--seeds", str(seed))
    return [checkout.start(*command, **place, RANK=str(r), LOCAL_RANK=str(r)) for r in range(WORLD)]


def folder(checkout: Checkout, arm: str) -> Path:
    (found,) = (checkout.folder / "results/runs/tiny" / arm).glob("seed0-*")
    return found


@pytest.mark.parametrize("arm", ["meanflow", "dmd2", "freeflow"])
def test_two_ranks_are_one_rank(checkout: Checkout, arm: str):
    assert checkout.run("distillbench", "train", "tiny", arm, "--seeds", "0").returncode == 0
    alone = folder(checkout, arm)
    one, record = (
        load_file(alone / "student.safetensors"),
        json.loads((alone / "result.json").read_text()),
    )
    (alone / "result.json").unlink()
    for process in (started := ranks(checkout, arm)):
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert len(started) == WORLD
    two, again = (
        load_file(alone / "student.safetensors"),
        json.loads((alone / "result.json").read_text()),
    )
    assert again["status"] == "done" and again["cost"]["steps"] == record["cost"]["steps"] >= 50
    assert (
        again["cost"]["flops"] == record["cost"]["flops"]
        and again["cost"]["rows"] == record["cost"]["rows"]
    )
    # another order of sums: they did share the work
    assert any(not v.equal(two[k]) for k, v in one.items())
    for k, v in one.items():
        assert (two[k] - v).abs().max() <= 1e-5 * max(1.0, v.abs().max().item()), k


METHOD = """
import os
import torch
from pydantic import BaseModel
from distillbench.method import Method, Needs
from distillbench.players import PlayerConfig

class Lossy(Method):
    class Config(BaseModel):
        pass
    @classmethod
    def needs(cls, config):
        return Needs(batch=8, nfe=(1,), headline_nfe=1)
    def __init__(self, task, config):
        self.net = task.network("teacher")
        self.student = task.player("student", PlayerConfig(lr=1e-3), self.net)
    def train_step(self, batch, step):
        x = step.rng("x").normal(batch.size, 1, 8, 8)
        if os.environ.get("RANK") == "1" and step.index == 3:
            {fault}
        loss = self.net(x, torch.ones(batch.size), batch.cond.labels).square().mean()
        self.student.update(loss)
        return {"loss": loss.detach()}
    def sample(self, noise, cond, nfe, rng):
        return noise - self.net(noise, torch.ones(len(noise)), cond.labels)
"""


def lossy(checkout: Checkout, fault: str) -> list[Command]:
    checkout.write("methods/lossy/method.py", METHOD.replace("{fault}", fault))
    checkout.write(
        "methods/lossy/config.yaml",
        "title: Lossy\nfidelity: reconstruction\npaper: none\nconfig: {}\n",
    )
    assert checkout.run("distillbench", "train", "tiny", "teacher", "--seeds", "0").returncode == 0
    return ranks(checkout, "lossy")


def test_an_error_of_one_rank_is_the_records_reason(checkout: Checkout):
    first, second = lossy(checkout, 'raise ValueError("rank one fell over")')
    assert (
        second.wait() == 2
        and "rank 1 ended: failed: ValueError: rank one fell over" in second.output()[1]
    )
    assert first.wait() == 2 and "lost another rank" in first.output()[1]
    record = json.loads((folder(checkout, "lossy") / "result.json").read_text())
    assert record["status"] == "failed" and record["reason"].startswith(
        "ValueError: rank one fell over"
    )


def test_a_rank_that_dies_at_the_same_step_again_is_the_methods_doing(checkout: Checkout):
    both = lossy(checkout, "os._exit(3)")
    for again in (False, True):
        first, second = ranks(checkout, "lossy") if again else both
        assert second.wait() == 1 and first.wait() == 2 and "lost another rank" in first.output()[1]
        assert (folder(checkout, "lossy") / "result.json").exists() == again
    record = json.loads((folder(checkout, "lossy") / "result.json").read_text())
    assert record["status"] == "failed" and record["reason"].startswith(
        "the process died 2 times: exit code 3 in training"
    )


def test_a_rank_that_is_killed_leaves_no_record(checkout: Checkout):
    first, second = lossy(checkout, "os.kill(os.getpid(), 9)")
    assert second.wait() == 2 and "was killed (SIGKILL)" in second.output()[1]
    assert first.wait() == 2 and "lost another rank" in first.output()[1]
    assert not (folder(checkout, "lossy") / "result.json").exists()
    assert os.environ.get("WORLD_SIZE") is None
