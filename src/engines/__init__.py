"""Engines: how many processes share a run, and how they talk."""
