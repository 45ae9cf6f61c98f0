"""Engines: ways to make the same steps. Each is one file behind the interface of ``base.py``."""
