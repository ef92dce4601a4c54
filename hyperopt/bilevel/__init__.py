"""Trained inner problems: two losses in, the hypergradient of a trained model out.

    min over lam   E(w(lam), lam)           the outer loss, on the validation set
    subject to     w(lam) = argmin L(., lam)    the inner loss; a fixed point of  phi(w) = w - step * grad_w L(w, lam)

A problem is two losses of ``(w, lam, batch)``; ``w`` and ``lam`` are trees of tensors (a tensor, or a dict, list or tuple):

    problem = hyperopt.BilevelProblem(inner_loss, outer_loss)
    estimate = hyperopt.hypergradient(problem, w, lam, adjoint=Implicit(CG()))      # at a w that is trained already
    estimate.grad            # a tree like lam
    estimate.certificate     # how far it may be from the exact one

Beside a training loop of your own, with losses that call the module itself, ``hyperopt.Tuner`` does all of this.

How a task does its outer steps, with inner training, warm starts and everything that a resume needs in one place:

    self.bilevel = hyperopt.Bilevel(problem, w0, inner=GradientDescent(step_size=0.1, max_steps=100), adjoint=Implicit(CG()))

    def closure():                                  # in Task.step
        optimizer.zero_grad()
        lam = self.space.values()                   # or the leaves themselves
        estimate = self.bilevel.step(lam)           # trains w from where it is, then the hypergradient there
        estimate.backward(lam)                      # adds to .grad, through the space's map
        guard(self.gradients())
        record = StepRecord(estimate.loss, estimate.metrics(), estimate.statuses())

    self.bilevel.w                                  # the trained weights; with ``Functional`` those of the module itself
    self.bilevel.state_dict(); self.bilevel.load_state_dict(state)      # and self.space's

    self.space = hyperopt.Hyperparameters({"decay": Positive(0.01, per="element")}, {"decay": self.bilevel.w})
    Task.groups() is self.space.groups();  after optimizer.step(closure): self.space.project_();  self.space.metrics()

Where training starts may be a function of the hyperparameters, ``BilevelProblem(..., initial=lambda lam: lam["start"])``: the
learned initial weights of MAML, by ``Unrolled()`` or ``Checkpointed()``. A rate may be one for each weight (Meta-SGD):
``GradientDescent(step_size="rate")`` with ``lam["rate"]`` in the structure of ``w``.

A model: ``model = Functional(module)``, then ``model(w, x)`` in the losses and ``model.w`` for ``w0``. Data:
``BilevelProblem(..., inner_batches=DataLoader(train, 64, shuffle=True), outer_batches=DataLoader(val, 256))``, with loaders of
``torch.utils.data`` (whose place is part of ``Bilevel.state_dict()``), ``Minibatches((x, y), size)`` or one batch ``(x, y)``;
without, ``batch`` is None and the losses have their data themselves. Configs: ``inner: ${inner}`` and ``adjoint: ${adjoint}`` in
the task's YAML, and ``products`` typed by ``ProductSettings``.

``adjoint`` takes the same adjoints as ``hyperopt.fixed_point`` (``Implicit`` with any linear solver, ``OneStep``, ``Phantom``,
``Unrolled``, ``Checkpointed``), ``T1T2``, ``FiniteDifference``, and every ``Estimator``. ``SOBA``, ``SABA``, ``StocBiO``,
``F2SA`` and ``VPBGD`` are such: they train the weights themselves, a few steps at a time, and take no ``inner``. A method of
your own is a class with one function, ``estimate(problem, lam, state)``, which keeps what it must remember in ``state``.
"""
