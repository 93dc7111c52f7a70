"""The page at ``/``: its files, and the headers that keep a browser from doing anything else with them.

The files are in ``web``: HTML, CSS and JavaScript of moetier's own, sent as they are. They hold no secrets, so browsers
get them without a key; what the page asks the server for needs one, as from any other client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

WEB = Path(__file__).parent / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FILES = {  # by the path of the request
    "/" if path.name == "index.html" else f"/page/{path.name}": path
    for path in sorted(WEB.iterdir())
    if path.suffix in TYPES
}
POLICY = (  # nothing inline, nothing from elsewhere, no text that becomes markup or code, and no frame around it
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # a new release's files must not meet those of the old one
}


def page_routes() -> Iterator[Route]:
    """Yield a route for each file of the page."""
    for route, path in FILES.items():
        yield Route(route, PageFile(path).answer)


class PageFile:
    """A file of the page, which is read once."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        tag = hashlib.sha256(self._content).hexdigest()[:32]
        self._headers = HEADERS | {"ETag": f'"{tag}"'}
        self._type = TYPES[path.suffix]

    async def answer(self, request: Request) -> Response:
        """Return the file, or 304 if the browser has it already."""
        known = request.headers.get("if-none-match", "")
        if self._headers["ETag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, media_type=self._type, headers=self._headers)
