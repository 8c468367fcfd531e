"""What all tests share; its place puts the project's root on the import path."""

from __future__ import annotations

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core; libraries that start a thread per core in each of them would wait for each other.
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, which their child processes would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
