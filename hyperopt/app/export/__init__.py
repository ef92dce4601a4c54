"""Runs as files for other machines: what was learned, how to build it, and how good it is."""
