"""Fingerprints: a short name for all that decides the content of something."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(value: Any) -> str:
    """32 hex digits, equal exactly for equal JSON values; whatever is not JSON is refused (TypeError)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
