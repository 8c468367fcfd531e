"""The client half as a Flower app: what app folders name as `clientapp`.

On a site, the node's configuration says everything about the site: `site`, its name; `site-file`, its own description;
`state`, the folder for what it keeps. The run configuration adds `experiment-record`, what is run, as JSON: values
only. The site's task is the one that its own file names; no name of a file or module that comes from the server is
ever looked at.

In a simulation on one machine (`flwr run`), the run configuration says `experiment`, the path of a run's `config.json`,
and `private`, the folder for what sites keep.
"""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from graftwork.federated.client import Worker
from graftwork.federated.domains import Federation
from graftwork.federated.errors import FederationError
from graftwork.federated.runs import Experiment, RunFolder
from graftwork.federated.site import load_site

app = ClientApp()


@lru_cache(maxsize=4)
def simulated_worker(experiment: str, private: str) -> Worker:
    """Return the worker of an experiment, one per process."""
    return Worker(RunFolder.open(Path(experiment).parent).experiment(), Path(private))


@lru_cache(maxsize=4)
def site_worker(record: str, name: str, site_file: str, state: str) -> Worker:
    """Return the worker of a site, one per process.

    Args:
        record: The experiment as the server describes it, in JSON.
        name: The site's name.
        site_file: Its own description.
        state: The folder for what it keeps.

    Raises:
        GraftworkError: The site's file is wrong, or it refuses what is asked.
    """
    experiment = experiment_of(record)
    site = load_site(Path(site_file), name)
    # The server's files are not on the site; what starts from a checkpoint here, the site's own file says.
    federation = dataclasses.replace(experiment.federation, data=None)
    experiment = dataclasses.replace(experiment, federation=federation, init=site.init)
    sites = Federation(experiment.federation.name, {site.site: site.task}, None)
    return Worker(experiment, Path(state), sites, site=site)


def experiment_of(record: str) -> Experiment:
    """Return the experiment that a server describes.

    Raises:
        FederationError: It cannot be read.
    """
    try:
        return Experiment.from_record(json.loads(record))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FederationError(
            f"cannot read the server's experiment-record ({type(error).__name__}: {error}); is the same version of "
            "graftwork installed on both sides?"
        ) from None


def worker_of(context: Context) -> Worker:
    """Return the worker that a node's and a run's configuration ask for.

    Raises:
        FederationError: Something is missing in them.
    """
    node, run = context.node_config, context.run_config
    site_file = str(node.get("site-file", ""))
    if site_file:
        record = str(run.get("experiment-record", ""))
        lacking = [key for key in ("site", "state") if not node.get(key)]
        if lacking:
            raise FederationError(f"the node's configuration has a site-file, but no {' and no '.join(lacking)}")
        if not record:
            raise FederationError("the server has not said what to run: its run configuration lacks experiment-record")
        return site_worker(record, str(node["site"]), site_file, str(node["state"]))
    path = str(run.get("experiment", ""))
    if not path:
        raise FederationError(
            "the run configuration lacks experiment, the path of a run's config.json; on a site, start the node with "
            "graftwork join"
        )
    return simulated_worker(path, str(run.get("private") or Path(path).parent / "private"))


def handle(message: Message, context: Context) -> Message:
    """Return the reply to a message."""
    return worker_of(context).handle(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train."""
    return handle(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate."""
    return handle(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer a question."""
    return handle(message, context)
