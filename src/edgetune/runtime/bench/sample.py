"""What the measuring processes write samples with."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def ms(seconds: float) -> float:
    """Seconds as a sample's milliseconds."""
    return round(seconds * 1e3, 3)


def sha256(value: Any) -> str:
    """The hash of token ids or messages."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
