"""The demo as a service: limits from the environment, and a page that tells a supervisor that the demo runs."""

import os

from starlette.requests import Request
from starlette.responses import JSONResponse

from .. import __version__

HEALTH = "/health"
LIMITS = {  # environment variable: default
    "SPARSEDM_QUEUE": 32,  # orders that may wait
    "SPARSEDM_VISITOR_ORDERS": 12,  # orders of one visitor (one network address) that wait or run
}


def limit(name: str) -> int:
    """The limit that an environment variable sets, or its default. Raises ValueError for a value that is no positive number."""
    value = os.environ.get(name, "").strip() or str(LIMITS[name])
    if not (value.isascii() and value.isdigit() and int(value)):
        raise ValueError(f"{name} is {value!r}: set it to a number from 1, or leave it out for {LIMITS[name]}")
    return int(value)


async def health(request: Request) -> JSONResponse:
    """Answers 200 with the version."""
    return JSONResponse({"status": "ok", "version": __version__})
