"""What `graftwork serve` tells the server's half of a run, which is another process: by a file in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.federated.runs import Experiment, write_text

RUN_VARIABLE = "GRAFTWORK_RUN"
"""The variable of the environment that names the run folder."""
PLACE = "deployment"
"""The folder in a run folder for what belongs to a deployment."""
ORDER = "server.json"
PRESENT = "present.json"
"""Which sites are there, while the server waits for them."""


@dataclass(frozen=True)
class Order:
    """What `graftwork serve` asks of the server's half.

    Args:
        experiment: What is run.
        sites: Names of the sites.
        task: The model's task, `file.py:name`; empty with a built-in simulation.
        server_task: The server's own data; empty if it has none.
        nodes: The site of each node by its number, as the keys say; empty without keys.
        wait: Seconds for which sites are waited for.
    """

    experiment: Experiment
    sites: tuple[str, ...]
    task: str
    server_task: str
    nodes: Mapping[int, str]
    wait: float

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "experiment": self.experiment.record(),
            "sites": list(self.sites),
            "task": self.task,
            "server_task": self.server_task,
            "nodes": {str(node): site for node, site in self.nodes.items()},
            "wait": self.wait,
        }

    def write(self, run: Path) -> None:
        """Write it into a run folder."""
        write_text(run / PLACE / ORDER, json.dumps(self.record(), indent=2) + "\n")

    @classmethod
    def load(cls, run: Path) -> Order:
        """Return what was written into a run folder."""
        said = json.loads((run / PLACE / ORDER).read_text(encoding="utf-8"))
        return cls(
            Experiment.from_record(said["experiment"]),
            tuple(said["sites"]),
            said["task"],
            said["server_task"],
            {int(node): site for node, site in said["nodes"].items()},
            said["wait"],
        )
