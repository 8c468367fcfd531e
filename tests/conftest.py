"""What all tests share; its place puts the project's root on the import path."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests in this folder speak of CPUs unless marked `gpu`
