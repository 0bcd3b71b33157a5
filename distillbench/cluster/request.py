"""What a job asks of SLURM, as sbatch's options, and what helps where sbatch refuses it.

Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# What sbatch says of a request that no repetition mends, and what does.
REFUSED = {
    "invalid partition": "set `partition` in slurm/site.yaml to one that `sinfo` lists",
    "invalid account": "set `account` in slurm/site.yaml",
    "invalid qos": "set `qos` in slurm/site.yaml",
    "node configuration is not available": (
        "ask for less in workflows/resources.yaml (gpus, cpus, memory_gb, nodes)"
    ),
    "more processors requested than permitted": (
        "ask for fewer cpus or ranks in workflows/resources.yaml"
    ),
    "requested time limit is invalid": "lower `minutes` in workflows/resources.yaml",
    "unrecognized option": "mend `sbatch` in slurm/site.yaml",
    "invalid option": "mend `sbatch` in slurm/site.yaml",
    "invalid feature": "mend `constraint` in slurm/site.yaml",
}


@dataclass(frozen=True)
class Request:
    """Resources of a job, how often it is tried, and options of this cluster.

    The fields are those of `registry.resources.Resources`, as `registry.resources.request` writes
    them.
    """

    nodes: int
    ranks: int  # per node
    gpus: int  # per node
    cpus: int  # per rank
    memory_gb: float  # per node
    minutes: int  # time limit of one attempt
    time_limits: int  # that a cell may reach
    tries: int  # submissions of a job that the machine lost
    backoff_s: float  # before the second of them; each further one waits twice as long
    sbatch: dict[str, Any]  # further options, without their dashes

    @classmethod
    def parse(cls, text: str) -> Request:
        """The request that stands in `text` as JSON."""
        return cls(**json.loads(text))

    def options(self) -> dict[str, Any]:
        """sbatch's options for the resources, in submitit's spelling."""
        options: dict[str, Any] = {
            "time": self.minutes,
            "mem": f"{round(self.memory_gb * 1024)}MB",
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks,
            "cpus_per_task": self.cpus,
        }
        if self.gpus:
            options["gpus_per_node"] = self.gpus
        return options

    def flags(self) -> list[str]:
        """Words of sbatch's command line, as submitit writes them into its script."""
        options = {name.replace("_", "-"): value for name, value in self.options().items()}
        options |= self.sbatch
        return [
            f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()
        ]


def remedy(message: str) -> str | None:
    """What helps against a refusal by sbatch that is for good; None where trying again may."""
    for words, help_ in REFUSED.items():
        if words in message.lower():
            return help_
    return None
