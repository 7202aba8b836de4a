"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on, up to the first stop string.

    Text that may be the beginning of a stop string is held until that is known, so a stop string never gets
    through, wherever the pieces are cut; and the result does not depend on where they are cut.

    Attributes:
        found: whether a stop string has come; everything after it is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take the next piece; returns what may be shown now."""
        if self.found:
            return ""
        self._held += text
        # The stop string that was complete first counts: that is the one a reader of single characters would
        # see.
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        at = len(self._held) - keep
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def rest(self) -> str:
        """What was held when the text has ended."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """How many of the last held characters are the beginning of `stop`."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
