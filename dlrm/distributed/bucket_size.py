"""How many bytes of dense gradients make a message: apart from torch, as plans count the messages without it."""

from __future__ import annotations

# Small enough that the last layers' gradients travel while the first layers' are computed, large enough that a
# message's latency (some 0.1 ms between processes of one machine) does not count.
BUCKET_BYTES = 1 << 20
