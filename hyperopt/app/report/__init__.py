"""``hyperopt report``: one page with figures that compares runs and sweeps. This package imports no torch."""
