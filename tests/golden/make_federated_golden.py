"""Write `federated.json`: the numbers of short federated runs, with the command and the versions that made them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
from typer.testing import CliRunner

from graftwork import __version__
from graftwork.cli.application import app
from tests.cli.test_simulate import CASES


def main() -> None:
    kept = {"made by": f"graftwork {__version__}, torch {torch.__version__}, Python {platform.python_version()}"}
    for algorithm, arguments in CASES.items():
        result = CliRunner().invoke(app, ["simulate", "digits", "-a", algorithm, *arguments, "--json"])
        lines = json.loads(result.stdout)["lines"]
        keys = ("round", "answered", "bytes", "train_loss", "accuracy", "sites")
        kept[algorithm] = [{key: line[key] for key in keys} for line in lines]
    Path(__file__).with_name("federated.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
