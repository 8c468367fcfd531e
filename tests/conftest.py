"""What all tests share; its place puts the project's root on the import path."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore Ctrl-C, which their child processes would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
