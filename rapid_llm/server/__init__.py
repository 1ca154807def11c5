"""A server: OpenAI's protocol over the decoder, with documents that stay read.

The extra ``server`` installs what it needs. :func:`rapid_llm.server.app.create_app` makes the ASGI
application, ``rapid-llm serve`` runs it.
"""
