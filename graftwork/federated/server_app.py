"""The server half as a Flower app: what app folders name as `serverapp`.

The run configuration says `experiment`, the path of a run's `config.json`; the run is written into the same folder, and
goes on from its newest round.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from graftwork.federated.algorithms import create
from graftwork.federated.domains import build
from graftwork.federated.errors import FederationError
from graftwork.federated.report import write_report
from graftwork.federated.runs import RunFolder
from graftwork.federated.strategy import Strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    path = str(context.run_config.get("experiment", ""))
    if not path:
        raise FederationError("the run configuration lacks experiment, the path of a run's config.json")
    folder = RunFolder.open(Path(path).parent)
    experiment = folder.experiment()
    strategy = Strategy(
        experiment, create(experiment.algorithm, experiment.settings), build(experiment.federation), folder
    )
    strategy.run(grid, resume=True)
    write_report(folder)
