"""An HTTP server that speaks the OpenAI API.

Others use ``app``. The package imports ``cli``, ``runtime.generation`` and ``runtime.model``; FastAPI is imported only
here.
"""
