"""Regularisers of a batch whose strengths are tensors with one entry for each example: ``(x, strength, keys) -> x``.

That is what a self-tuning network needs, whose every example is trained under hyperparameters of its own. Each works on the
batch's device, draws by the example's number alone (``hyperopt.core.random``), and does nothing at strength 0. No value is read
back from the device to be checked: a strength outside of its range makes its example NaN, which no loss survives unseen.
"""
