"""Errors of a federation.

GraftworkError
└── FederationError   a federation is described wrongly or cannot go on
    └── QuorumError   too few clients gave a usable answer (exit code 3)
"""

from __future__ import annotations

from graftwork.merge.errors import GraftworkError


class FederationError(GraftworkError):
    """A federation is described wrongly, or cannot go on."""


class QuorumError(FederationError):
    """Too few clients gave a usable answer; the message says who failed, and why."""
