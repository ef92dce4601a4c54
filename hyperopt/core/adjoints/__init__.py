"""Adjoints: how a solved fixed point becomes a differentiable one."""
