"""Requests that a store answers with no. Unlike `StoreUnavailable` these are certain: nothing was changed."""

from __future__ import annotations

from autoglm_elastic.errors import ElasticError, Fault


class StoreRefused(ElasticError):
    """The request broke a limit or was malformed."""

    fault = Fault.OURS
    code = "refused"


class LeaseGone(StoreRefused):
    """The write was to be owned by a lease that has expired, was revoked, or never was."""

    fault = Fault.PLATFORM
    code = "lease_gone"


class StoreDenied(StoreRefused):
    """The store does not let us: wrong user, password, certificate or role."""

    fault = Fault.USER
    code = "denied"


def refusal(code: str, message: str) -> StoreRefused:
    """The error that a server's answer stands for."""
    return LeaseGone(message) if code == LeaseGone.code else StoreRefused(message)
