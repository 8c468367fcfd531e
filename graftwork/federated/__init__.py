"""Federated learning on the merge engine: algorithms, their runtime on Flower, simulations.

Nothing here imports flwr until a federation is run; the two settings below are read by flwr when it is imported, and
keep it from calling home.
"""

from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
