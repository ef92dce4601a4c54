"""Inner solvers: how the model is trained, for given hyperparameters."""
