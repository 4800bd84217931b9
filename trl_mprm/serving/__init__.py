"""Serve a process reward model over HTTP: export for vLLM, our own server, one client for both."""
