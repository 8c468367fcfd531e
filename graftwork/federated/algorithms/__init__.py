"""The algorithms by name. Adding one takes a file in this folder and a row in `_HOMES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import did_you_mean

if TYPE_CHECKING:
    from graftwork.federated.algorithms.base import Algorithm

_HOMES = {
    "fedavg": "fedavg.FedAvg",
    "fedprox": "fedprox.FedProx",
    "fedbn": "fedbn.FedBN",
    "scaffold": "scaffold.Scaffold",
    "local": "local.Local",
    "one-shot": "local.OneShot",
    "fedadam": "flower.FedAdam",
    "fedyogi": "flower.FedYogi",
    "fedadagrad": "flower.FedAdagrad",
    "fedavgm": "flower.FedAvgM",
    "fedka": "fedka.FedKA",
    "fraug": "fraug.FRAug",
    "ggeur": "ggeur.GGEUR",
}
"""Name → file and class."""


def names() -> tuple[str, ...]:
    """Return the names of all algorithms."""
    return tuple(_HOMES)


def algorithm_class(name: str) -> type[Algorithm]:
    """Return an algorithm's class."""
    module, _, cls = _HOMES[name].partition(".")
    found: type[Algorithm] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found


def create(name: str, given: Mapping[str, Any] | None = None) -> Algorithm:
    """Return an algorithm by its name or the name of a preset, with settings on top (values, or texts).

    Raises:
        FederationError: There is no such algorithm, preset or setting.
    """
    from graftwork.federated.algorithms.base import parse_settings

    base = name
    while base not in _HOMES and "-" in base:
        base = base.rpartition("-")[0]
    if base not in _HOMES:
        raise FederationError(
            f"there is no algorithm {quoted(name)}{did_you_mean(name, _HOMES) or '; there are ' + listed(_HOMES, 20)}"
        )
    cls = algorithm_class(base)
    preset: Mapping[str, Any] = cls.presets.get(name, {})
    if name != base and name not in cls.presets:
        raise FederationError(
            f"there is no preset {quoted(name)} of {base}{did_you_mean(name, cls.presets)}; there are "
            f"{listed([base, *cls.presets], 20)}"
        )
    return cls(parse_settings(cls.settings_type, given or {}, preset))
