"""The page's visitors: how many orders of each may wait, and whether anybody still listens for the results."""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import parse_qs

from gradio.context import LocalContext
from gradio.queueing import Queue
from starlette.requests import Request
from starlette.responses import JSONResponse

from .serving import limit

PATIENCE = 5.0  # seconds after its order within which a script must have begun to listen

_ORDER = re.compile(r"/(queue/join|call/(v2/)?[^/]+)/?$")
_RESULTS = re.compile(r"/call/(v2/)?[^/]+/(?P<event>[^/]+)$")
_listening: Counter[str] = Counter()  # open streams of results, by session or event


class Door:
    """ASGI middleware of the app: it refuses a visitor's orders above their limit and notes who listens for results."""

    def __init__(self, app):
        self.app, self._arriving = app, Counter()

    async def __call__(self, scope, receive, send) -> None:
        method, path = scope.get("method"), scope.get("path", "")
        if method == "POST" and _ORDER.search(path):
            await self._order(scope, receive, send)
        elif method == "GET" and (key := _stream(scope)):
            with _counted(_listening, key):
                await self.app(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _order(self, scope, receive, send) -> None:
        address = _address(Request(scope))
        most = limit("SPARSEDM_VISITOR_ORDERS")  # Gradio bounds the orders of all visitors
        events = scope["app"].get_blocks()._queue.event_ids_to_events.values()
        if self._arriving[address] + sum(_address(event.request) == address for event in events) >= most:
            answer = JSONResponse({"detail": f"You have {most} orders waiting: let one end, then order again."}, 429)
            await answer(scope, receive, send)
            return
        with _counted(self._arriving, address):  # orders that are not yet in the queue
            await self.app(scope, receive, send)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _stream(scope) -> str | None:
    """The session or the event whose results a request asks for."""
    if scope["path"].endswith("/queue/data"):
        return parse_qs(scope["query_string"].decode()).get("session_hash", [None])[0]
    match = _RESULTS.search(scope["path"])
    return match and match["event"]


@contextlib.contextmanager
def _counted(counter: Counter[str], key: str) -> Iterator[None]:
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


class Visit:
    """The order that the calling function carries out. A function called by neither page nor script has no visitor to lose."""

    def __init__(self):
        blocks, self._id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
        self._queue: Queue | None = blocks._queue if blocks and self._id else None

    def check(self) -> None:
        """Raises ConnectionAbortedError once nobody waits for the results: page closed, order cancelled, or never listened to."""
        if self._queue is not None and not self._awaited(self._queue):  # an empty queue is false
            raise ConnectionAbortedError(f"nobody listens: open the stream of results within {PATIENCE:g} seconds of the order")

    def _awaited(self, queue: Queue) -> bool:
        event = queue.event_ids_to_events.get(self._id)
        if event is None or not event.alive or not any(event in job for job in queue.active_jobs if job):
            return False
        listened = _listening[event._id] or _listening[event.session_hash]
        return bool(listened) or time.monotonic() - event.enqueue_time < PATIENCE
