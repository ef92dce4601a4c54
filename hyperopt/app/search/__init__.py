"""Sweeps that search: ``hydra/sweeper=optuna`` proposes the next jobs from the results of those before.

``space`` reads the search space, ``settings`` the keys of ``hydra.sweeper``, ``storage`` the place where Optuna keeps its study,
``search`` proposes trials and stops runs early, and ``trials`` tells Optuna how they ended. Optuna is imported only when a
sweep searches. Nothing here imports torch.
"""
