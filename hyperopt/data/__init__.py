"""Datasets: their settings, sources and splits.

``hyperopt.data.digits.Digits``, ``hyperopt.data.mnist.MNIST``, ``hyperopt.data.mnist.FashionMNIST`` and
``hyperopt.data.cifar.CIFAR10`` are what a config names; each has ``load(dtype, device) -> hyperopt.data.splits.Splits``.
``hyperopt.data.own.Own`` makes a dataset of an ordinary one of torch or of arrays, and ``hyperopt.data.augment.Augment`` changes
a batch of images at random. Importing this package imports neither torch nor numpy.
"""

from hyperopt.data.reading import DataError

__all__ = ["DataError"]
