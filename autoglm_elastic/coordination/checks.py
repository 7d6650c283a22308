"""What a transaction may ask for, whichever store it goes to."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from autoglm_elastic.coordination import limits
from autoglm_elastic.coordination.refusals import StoreRefused
from autoglm_elastic.ports import Compare, Delete, Put

_to_json = msgspec.json.Encoder()

Prepared = tuple[str, bytes | None, int]
"""Key, value as JSON (None: delete), lease."""


def check_txn(compares: Sequence[Compare], operations: Sequence[Put | Delete]) -> list[Prepared]:
    """The operations, ready to be stored. Raises `StoreRefused`."""
    if len(compares) > limits.TXN_COMPARES_MAX or len(operations) > limits.TXN_OPERATIONS_MAX:
        raise StoreRefused(
            f"transaction of {len(compares)} compares and {len(operations)} operations",
            valid=f"at most {limits.TXN_COMPARES_MAX} and {limits.TXN_OPERATIONS_MAX}",
        )
    prepared = [_prepare(operation) for operation in operations]
    if len({key for key, _, _ in prepared}) != len(prepared):
        raise StoreRefused("transaction that writes one key twice")
    return prepared


def check_lease(ttl_s: float) -> None:
    """Raises `StoreRefused`."""
    if not limits.LEASE_S_MIN <= ttl_s <= limits.LEASE_S_MAX:
        raise StoreRefused(f"lease of {ttl_s} s", valid=f"{limits.LEASE_S_MIN} to {limits.LEASE_S_MAX} s")


def _prepare(operation: Put | Delete) -> Prepared:
    if not 0 < len(operation.key.encode()) <= limits.KEY_BYTES_MAX:
        raise StoreRefused(
            f"key of {len(operation.key.encode())} bytes", valid=f"1 to {limits.KEY_BYTES_MAX}"
        )
    if isinstance(operation, Delete):
        return operation.key, None, 0
    try:
        data = _to_json.encode(operation.value)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreRefused(f"value of {operation.key} is not JSON: {error}") from None
    if len(data) > limits.VALUE_BYTES_MAX:
        raise StoreRefused(
            f"value of {operation.key} has {len(data)} bytes", valid=f"at most {limits.VALUE_BYTES_MAX}"
        )
    return operation.key, data, operation.lease
