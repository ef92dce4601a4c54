"""Datasets: settings (torch-free), sources, splits.

``hyperopt.data.digits.Digits``, ``hyperopt.data.mnist.MNIST`` and ``hyperopt.data.mnist.FashionMNIST`` are what a config names;
each has ``load(dtype, device) -> hyperopt.data.splits.Splits``. Importing this package imports neither torch nor numpy.
"""

from hyperopt.data.errors import DataError

__all__ = ["DataError"]
