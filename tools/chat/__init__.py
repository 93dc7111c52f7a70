"""A conversation on the terminal.

``chat_input`` reads messages and commands, ``dialogue`` answers the messages by ``answer``, and ``commands`` runs the
commands. ``options`` has what commands may change of the next answers, and ``state`` what is kept for later chats. The
package imports ``cli``, ``runtime.generation`` and ``runtime.model``.
"""
