"""Serve a process reward model over HTTP, by vLLM or by a server of our own; one client reads both."""
