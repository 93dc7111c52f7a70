"""An HTTP server that speaks the OpenAI API.

A request passes ``listen``, ``middleware``, ``app`` and ``completions``, which checks its body (``request``) and
submits a job to the engine: ``sequential`` or ``batched``. The package imports ``cli``, ``runtime.generation`` and
``runtime.model``; Starlette is imported only here.
"""
