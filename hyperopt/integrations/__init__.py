"""Callbacks for other people's trainers, each around a ``hyperopt.Tuner``; the extra ``trainers`` installs their packages.

hyperopt.integrations.lightning.TunerCallback(tuner, every_n_steps=100)             for lightning.pytorch.Trainer
hyperopt.integrations.transformers.TunerCallback(tuner, trainer, every_n_steps=100)     for transformers.Trainer
"""
