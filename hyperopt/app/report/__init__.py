"""``hyperopt report``: one page, and its figures, that compare runs and sweeps. Free of torch."""
