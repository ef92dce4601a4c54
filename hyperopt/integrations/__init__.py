"""Callbacks for the trainers of other libraries; each drives a ``hyperopt.Tuner``. The extra ``trainers`` installs the libraries.

hyperopt.integrations.lightning.TunerCallback(tuner, every_n_steps=100)             for lightning.pytorch.Trainer
hyperopt.integrations.transformers.TunerCallback(tuner, trainer, every_n_steps=100)     for transformers.Trainer
"""
