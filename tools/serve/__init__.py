"""An HTTP server that speaks APIs of OpenAI and Anthropic.

In this package a *request* is an HTTP request. Each answer to it is a *job*, which has the engine's ``Request``: one
prompt, and how it is to be continued.

A request passes through ``listen``, ``middleware``, ``app`` and ``endpoint``. Its protocol (``protocols``) checks the
body, and says what it asks for. ``models`` loads the model that it names (``catalogue``), with all that ``serving``
makes for it, and unloads others if their memory is needed (``reservation``). ``prompts`` renders and tokenises the
prompts, ``request_answers`` has the answers to one request, ``answers`` submits each to the engine and turns tokens
into events, and ``parsing`` finds thoughts and tool calls in them. The protocol writes the events. What an answer may
be is compiled by ``constraints``; ``answer_grammar`` writes it down, and ``call_syntax`` how a model writes calls.
``keys`` has the API keys and what each may use. ``page`` sends the files of the page at ``/``, which are in ``web``;
the page is a client of the same routes as any other. The package imports ``cli``, ``plan``, ``runtime.generation``,
``runtime.engine`` and ``runtime.model``. Of other packages only ``tools.ray`` imports Starlette.

On its way it is, in this order: the protocol's body; a ``Query``, with a ``ChatPrompt`` or text for each prompt; a
``Job`` for each answer, with a ``Request``; of the engine, a ``TokenSequence``; an ``Answer``, among the
``RequestAnswers``; its ``Event`` values, which ``Answered`` collects; and the ``Reply`` that the protocol writes.
"""
