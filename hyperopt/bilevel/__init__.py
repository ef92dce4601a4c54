"""Trained inner problems: from an inner and an outer loss to the hypergradient of a trained model.

    min over lam   E(w(lam), lam)               the outer loss, on the validation set
    subject to     w(lam) = argmin L(., lam)    the inner loss; a fixed point of  phi(w) = w - step * grad_w L(w, lam)

A problem is two losses of ``(w, lam, batch)``; ``w`` and ``lam`` are trees of tensors (a tensor, or a dict, list or tuple):

    problem = hyperopt.BilevelProblem(inner_loss, outer_loss)
    estimate = hyperopt.hypergradient(problem, w, lam, adjoint=Implicit(CG()))      # at a w that is trained already
    estimate.grad            # a tree like lam
    estimate.certificate     # how far it may be from the exact one

``hyperopt.Tuner`` does all of this beside your own training loop, with losses that call the module itself.

``Bilevel`` keeps the weights, the warm starts and everything else that a resumed run needs in one place. A task uses it like
this:

    self.bilevel = hyperopt.Bilevel(problem, w0, inner=GradientDescent(step_size=0.1, max_steps=100), adjoint=Implicit(CG()))

    def closure():                                  # in Task.step
        optimizer.zero_grad()
        lam = self.space.values()                   # or the leaves themselves
        estimate = self.bilevel.step(lam)           # trains w from where it is, then takes the hypergradient there
        estimate.backward(lam)                      # adds to .grad, through the space's map
        check(self.gradients())
        record = StepRecord(estimate.loss, estimate.metrics(), estimate.statuses())

    self.bilevel.w                                  # the trained weights; with ``Functional`` those of the module itself
    self.bilevel.state_dict(); self.bilevel.load_state_dict(state)      # and the same of self.space

    self.space = hyperopt.Hyperparameters({"decay": Positive(0.01, per="element")}, {"decay": self.bilevel.w})
    Task.groups() is self.space.groups();  after optimizer.step(closure): self.space.project_();  self.space.metrics()

The docstrings of ``BilevelProblem`` (learned initial weights, batches), ``GradientDescent`` (learned rates) and ``Functional``
(modules) say the rest. A task's YAML has ``inner: ${inner}`` and ``adjoint: ${adjoint}``; its field ``products`` is a
``ProductSettings``. To add a method, write a class with one function, ``estimate(problem, lam, state)``, which keeps what it must
remember in ``state``; see ``Estimator``.
"""
