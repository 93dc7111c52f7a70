"""An HTTP server that speaks the OpenAI API.

A request passes through ``listen``, ``middleware``, ``app`` and ``completions``. ``completions`` checks the request's
body (``request``) and submits a job to the server's engine, which is in ``sequential`` or ``batched``. The package
imports ``cli``, ``runtime.generation`` and ``runtime.model``. No other package imports Starlette.
"""
