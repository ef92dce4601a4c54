"""The Newton family: fixed-point methods that solve a linear system in every step."""
