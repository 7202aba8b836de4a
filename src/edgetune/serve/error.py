"""A refusal or a failure on the wire."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refusal or a failure, as the client gets it.

    Args:
        status: HTTP status.
        message: what is wrong and what to do, for the person who reads the client's log.
        param: the request's parameter that is to blame.
        code: a short fixed word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
