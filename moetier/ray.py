"""moetier on Ray Serve (docs/machines.md).

app(model=DIR, ram=..., max_replicas=...)  -> an application, for ray.serve.run and as a builder
session_ids()                              -> middleware of Ray's HTTP proxies, which knows conversations
"""

from __future__ import annotations

from moetier.tools.ray.app import app as app
from moetier.tools.ray.session_ids import session_ids as session_ids

__all__ = ["app", "session_ids"]
