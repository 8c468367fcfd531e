"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from graftwork.federated.runs import RunFolder


def write_report(folder: RunFolder) -> None:
    """Write `report.html`."""
