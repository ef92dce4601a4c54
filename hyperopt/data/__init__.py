"""Datasets: their settings, sources and splits.

A config names a class such as ``hyperopt.data.digits.Digits``, ``hyperopt.data.mnist.MNIST`` or
``hyperopt.data.cifar.CIFAR10``; each has ``load(dtype, device) -> hyperopt.data.splits.Splits``. ``hyperopt.data.own.Own``
makes a dataset from one of torch or from arrays, and ``hyperopt.data.augment.Augment`` changes a batch of images at random.
Importing this package imports neither torch nor numpy.
"""

from hyperopt.data.reading import DataError

__all__ = ["DataError"]
