"""APIs that clients speak: each has a module with its requests, and with how it writes an answer.

A protocol turns a body into a ``Query`` (``query``), and the events of an answer (``events``) into JSON or server-sent
events. ``protocol`` has the interface, ``body`` the validation that all have in common, ``refusal`` the errors. Nothing
here knows a model, an engine or a connection.
"""
