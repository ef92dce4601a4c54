"""Runs as files that leave their machine: what was learned, with what it takes to build it and what it is worth."""
