"""An HTTP server that speaks the OpenAI API.

A request passes through ``listen``, ``middleware``, ``app`` and ``completions``. ``completions`` parses the request's
body (``bounded_json``), checks it (``request``), and submits a job to the server's engine (``answers``). ``messages``
and ``replay`` make the messages and the tokens of a prompt; ``parsing`` finds thoughts and tool calls in an answer. The
package imports ``cli``, ``runtime.generation``, ``runtime.engine`` and ``runtime.model``. Of other packages only
``tools.ray`` imports Starlette.
"""
