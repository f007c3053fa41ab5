"""Requests that are refused before Gradio sees them."""

import re
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

# Gradio would load the address itself and hand it on.
ELSEWHERE = re.compile(r"/file[=/]\s*https?:", re.IGNORECASE)


class RefuseElsewhere:
    """Refuses requests for files of other servers.

    Args:
        app: Answers all others.
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] == "http" and ELSEWHERE.search(scope["path"]):
            answer = PlainTextResponse("not a file of this server", status_code=403)
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def middleware(host: str | None) -> list[Middleware]:
    """Return what requests go through.

    Args:
        host: The one address by which the page is reached. Another name that leads to it may be a
            stranger's, whose page would read this one. None allows any name.
    """
    checks = [Middleware(RefuseElsewhere)]
    if host is not None:
        names = [host, "localhost", "127.0.0.1", f"[{host}]"]
        checks.append(Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
    return checks
