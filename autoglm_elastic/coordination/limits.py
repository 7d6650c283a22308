"""Every bound of the coordination store in one place. What exceeds one is refused; nothing grows without
one."""

from __future__ import annotations

from typing import Final

FRAME_BYTES_MAX: Final = 4 << 20
"""One message either way: a sealed generation of ten thousand nodes fits."""

HELLO_BYTES_MAX: Final = 4 << 10
"""The first frame of a connection that has not shown yet that it speaks our protocol."""

HELLO_S_MAX: Final = 5.0
"""A connection that has not said hello by then is closed, so that strangers cannot use up
`CONNECTIONS_MAX`."""

KEY_BYTES_MAX: Final = 512
VALUE_BYTES_MAX: Final = 3 << 20
"""Below `FRAME_BYTES_MAX` by more than a transaction's frame around it needs."""

KEYS_MAX: Final = 1 << 17
STORED_BYTES_MAX: Final = 256 << 20
"""All values together."""

TXN_COMPARES_MAX: Final = 64
TXN_OPERATIONS_MAX: Final = 4096
"""One transaction can clear what a generation of that many nodes left behind."""

LEASES_MAX: Final = 1 << 15
LEASE_S_MIN: Final = 0.05
LEASE_S_MAX: Final = 3600.0

HISTORY_EVENTS_MAX: Final = 1 << 14
HISTORY_BYTES_MAX: Final = 64 << 20
"""Events kept for watches that resume; an older one answers `lost`."""

CONNECTIONS_MAX: Final = 4096
WATCHES_PER_CONNECTION_MAX: Final = 64
OUTBOX_BYTES_MAX: Final = 32 << 20
"""A connection that lets more pile up does not read any more and is closed; its watches resume when it is
back."""

IN_FLIGHT_MAX: Final = 1024
"""Requests one client may have unanswered."""

DISCONNECT_GRACE_S: Final = 0.2
"""How long a lease outlives the connection that it is bound to: time for a living client to come back."""

RECONNECT_S_MAX: Final = 30.0
"""A client that has found no server for so long gives up: later calls fail at once."""
BACKOFF_S_MIN: Final = 0.02
BACKOFF_S_MAX: Final = 0.5
