"""Errors as a client of the API reads them: OpenAI's shape, the project's three parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import AddbenchError, PreconditionError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
"""OpenAI's `type` by status; every other one is an invalid_request_error."""


class ApiError(AddbenchError):
    """A request that is refused or failed, with its HTTP status.

    Args:
        param: the field that is wrong.
        code: one word for programs.
        headers: sent with it.
    """

    def __init__(
        self,
        what: str,
        why: str,
        next: str,
        *,
        status: int = 400,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(what, why, next)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        """`{"error": {"message": "what: why; next", "type": ..., "param": ..., "code": ...}}`."""
        return {
            "error": {
                "message": f"{self.what}: {self.why}; {self.next}",
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def api_error(error: AddbenchError) -> ApiError:
    """Any error of the project's as the API's: one that is the caller's is a 400."""
    if isinstance(error, ApiError):
        return error
    mine = isinstance(error, PreconditionError)
    return ApiError(
        error.what, error.why, error.next,
        status=400 if mine else 500, code="invalid_value" if mine else "internal_error",
    )  # fmt: skip


def loading(detail: str) -> ApiError:
    return ApiError(
        "the model is not ready", detail, "ask again in a moment; GET /health says when",
        status=503, code="model_loading", headers={"Retry-After": "1"},
    )  # fmt: skip


def draining() -> ApiError:
    return ApiError(
        "the server is shutting down", "it finishes what it has and takes nothing new",
        "ask again when it is back", status=503, code="draining", headers={"Retry-After": "5"},
    )  # fmt: skip


def queue_full(waiting: int, limit: int, seconds: float) -> ApiError:
    retry = max(1, round(seconds + 0.5))
    return ApiError(
        "the queue is full", f"{waiting} pictures wait and it holds {limit}",
        f"ask again in {retry} s", status=429, code="queue_full",
        headers={"Retry-After": str(retry)},
    )  # fmt: skip


def too_late(seconds: float) -> ApiError:
    return ApiError(
        "the picture was not begun in time", f"it waited for {seconds:g} s, the server's deadline",
        "ask again when less is waiting, or raise --deadline", status=504, code="deadline",
    )  # fmt: skip
