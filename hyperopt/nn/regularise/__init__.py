"""Regularisers of a batch whose strengths are tensors with one entry for each example: ``(x, strength, keys) -> x``.

Self-tuning networks need this, since each of their examples is trained under its own hyperparameters. A regulariser works on
the batch's device, draws by the example's number alone (``hyperopt.core.random``), and does nothing at strength 0. No value is
read back from the device for a check: a strength out of range makes its example NaN, which shows in the loss.
"""
