"""An OpenAI-compatible server: HTTP in front (`app`), one engine behind (`engine`), ranks that do the same (`ranks`).

One thread owns the decoders; requests reach it over a bounded queue, and tokens go back to the event loop of the server.
"""
