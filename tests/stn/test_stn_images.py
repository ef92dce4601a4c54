"""Classifiers of images that tune their regularisation: the network, both losses, the order of batches, resuming, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from optimizers import adam
from torch import Tensor, nn
from torch.nn import functional

from hyperopt.core.random import Keys, Stream, keyed
from hyperopt.data.digits import Digits
from hyperopt.nn.regularise.dropout import dropout
from hyperopt.stn import Bounded, Discrete, HyperSpace, Positive, convert
from hyperopt.stn.classifiers import Classifier
from hyperopt.stn.row_dropout import RowDropout
from hyperopt.tasks.base import Environment
from hyperopt.tasks.stn import SelfTuningOptions
from hyperopt.tasks.stn_images import StnImagesTask
from hyperopt.tasks.stn_problem import ImageProblem

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own, at its first dual level
SPLITS = Digits(train=60, val=40, test=30).load(torch.float64)
TUNED: dict[str, Any] = {
    "dropout0": Bounded(0.3, 0.0, 0.9),
    "dropout1": Bounded(0.2, 0.0, 0.9),
    "input_noise": Bounded(0.2, 0.0, 2.0),
    "weight_decay": Positive(1e-3, per="batch"),
    "cut_holes": Discrete(1, 0, 3),
    "cut_length": Discrete(2, 0, 6),
}


def environment(seed: int = 0) -> Environment:
    return Environment(torch.device("cpu"), torch.float64, seed, False, torch.Generator().manual_seed(seed))


def task(**values: Any) -> StnImagesTask:
    made = StnImagesTask(
        classifier=Classifier(channels=(4,), strides=(2,), dense=(8,)),
        tuned=TUNED,
        batch_size=25,
        val_batch_size=15,
        dataset=Digits(train=60, val=40, test=30),
        stn=SelfTuningOptions(warmup=2, **values),
    )
    made.setup(environment())
    return made


def test_a_network_has_dropout_where_it_is_declared() -> None:
    alexnet = Classifier((64, 192, 384, 256, 256), (2, 1, 1, 1, 1), (0, 1, 4), dense=(40, 40), dense_dropout="before")
    assert alexnet.dropouts == tuple(f"dropout{k}" for k in range(7))
    built = alexnet.build((3, 32, 32), 10, alexnet.dropouts)
    names = [name for name, _ in built.named_children()]
    assert names[:5] == ["conv0", "relu0", "pool0", "dropout0", "conv1"]
    assert names[names.index("flatten") :] == ["flatten", "dropout5", "dense5", "relu5", "dropout6", "dense6", "relu6", "last"]
    layers = [module for module in built if isinstance(module, RowDropout)]
    assert [(layer.name, layer.stream, layer.channels) for layer in layers] == [(f"dropout{k}", k, k < 5) for k in range(7)]
    assert built.get_submodule("dense5").in_features == 256 * 2 * 2  # pyright: ignore[reportAttributeAccessIssue]
    one = Classifier(dense=(8, 8)).build((1, 8, 8), 10, ["dropout1"])
    assert [name for name, _ in one.named_children()][1:] == ["dense0", "relu0", "dense1", "relu1", "dropout1", "last"]


def test_row_dropout_reads_the_draw_and_the_keys() -> None:
    space = HyperSpace({"rate": Bounded(0.5, 0.0, 0.9)}, dtype=torch.float64)
    stn = convert(nn.Sequential(nn.Linear(3, 5), RowDropout("rate", 2)).double(), space)
    x, keys, draw = torch.ones(7, 3, dtype=torch.float64), Keys(torch.arange(7), 1, 2), space.draw(7)
    with keyed(keys):
        out = stn(x, draw)
    expected = dropout(_linear(stn, x), draw.h["rate"], keys, Stream.LAYER + 2)
    assert torch.equal(out, expected) and (out == 0).any()
    with pytest.raises(RuntimeError, match="RowDropout '1' draws by the numbers of the examples"):
        stn(x, draw)
    assert torch.equal(stn.eval()(x, draw), _linear(stn, x))


def test_a_collapsed_network_is_a_plain_one() -> None:
    made = task()
    plain = made.model.collapse()
    kinds = {name: type(module) for name, module in plain.named_children() if name.startswith("dropout")}
    assert kinds == {"dropout0": nn.Dropout2d, "dropout1": nn.Dropout}
    assert plain.get_submodule("dropout0").p == pytest.approx(0.3)  # pyright: ignore[reportAttributeAccessIssue]
    x = made.problem.pipeline.plain(made.problem.train.draw()[0])
    assert torch.allclose(plain.eval()(x), made.model.eval()(x)) and plain.train()(x).shape == (25, 10)


def _linear(stn: Any, x: Tensor) -> Tensor:
    layer = stn.module[0]
    return functional.linear(x, layer.weight, layer.bias)  # gates are zero: no response yet


def test_the_training_loss_by_hand() -> None:
    made = task()
    problem, space = made.problem, made.model.space
    images, labels, keys = problem.train.draw()
    draw = space.draw(25, torch.Generator().manual_seed(3))
    made.model.train()
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "gate" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        got = made.train_loss(made.model, (images, labels, keys), draw)
        with keyed(keys):
            logits = made.model(problem.pipeline(images, draw.h, keys), draw)
    decay = draw.h["weight_decay"][0]
    assert torch.equal(draw.h["weight_decay"], decay.expand(25))  # one for the batch
    assert torch.allclose(got, functional.cross_entropy(logits, labels) + decay * made.model.squared_norm(draw).mean() / 2)
    plain = problem.pipeline.plain(images)
    with torch.no_grad():
        made.model.eval()
        assert torch.allclose(
            made.valid_loss(made.model, (images, labels, keys), None), functional.cross_entropy(made.model(plain), labels)
        )


def test_each_layer_has_its_own_decay() -> None:
    classifier = Classifier(channels=(4,), strides=(2,), dense=(8,))
    assert classifier.layers == ("conv0", "dense1", "last")
    tuned = {f"weight_decay_{layer}": Positive(value) for layer, value in (("conv0", 0.3), ("last", 0.7))}
    problem = ImageProblem(SPLITS, tuned, classifier.dropouts, 10, 10, 0, classifier.layers)
    torch.manual_seed(0)
    plain = classifier.build(SPLITS.shape, 10, ()).double()
    model = convert(plain, HyperSpace(tuned, dtype=torch.float64))
    batch = problem.train.draw()
    want = functional.cross_entropy(plain(problem.pipeline.plain(batch[0])), batch[1])
    weights = dict(plain.named_parameters())
    want = want + (0.3 * weights["conv0.weight"].square().sum() + 0.7 * weights["last.weight"].square().sum()) / 2
    torch.testing.assert_close(problem.train_loss(model, batch, model.space.draw(10, perturb=False)), want)
    with pytest.raises(ValueError, match=r"'weight_decay_conv1' is not used; the names are .*weight_decay_last"):
        ImageProblem(SPLITS, {"weight_decay_conv1": Positive(0.1)}, classifier.dropouts, 10, 10, 0, classifier.layers)


def test_a_batch_split_in_two_is_trained_on_the_same_images() -> None:
    made = task()
    images, _, keys = made.problem.train.draw()
    h = {name: torch.full((25,), value, dtype=torch.float64) for name, value in made.model.space.values().items()}
    whole = made.problem.pipeline(images, h, keys)
    halves = [
        made.problem.pipeline(images[at], {name: each[at] for name, each in h.items()}, replace(keys, index=keys.index[at]))
        for at in (slice(0, 10), slice(10, None))
    ]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("mode", ["classic", "centred", "delta", "delta_linear"])
def test_rounds_learn_and_resume_bit_for_bit(mode: str) -> None:
    made = task(mode=mode)
    optimizer = adam(lr=0.05).build(made.groups())
    before, start = made.evaluate(), made.model.space.values()

    def rounds(of: StnImagesTask, moved: torch.optim.Optimizer, count: int) -> list[float]:
        return [of.step(moved, lambda gradients: None).metrics["stn/train_loss"] for _ in range(count)]

    rounds(made, optimizer, 6)
    kept, moments = made.state_dict(), optimizer.state_dict()
    kept, moments = torch.load(_saved(kept), weights_only=True), torch.load(_saved(moments), weights_only=True)
    went_on = rounds(made, optimizer, 4)
    again = task(mode=mode)
    other = adam(lr=0.05).build(again.groups())
    again.load_state_dict(kept)
    other.load_state_dict(moments)
    assert rounds(again, other, 4) == went_on
    for one, two in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    found = made.evaluate()
    assert found["outer/loss"] < before["outer/loss"] and {"val/loss", "val/accuracy", "test/loss", "test/accuracy"} <= set(found)
    assert all(value != start[name] for name, value in made.model.space.values().items() if not name.startswith("cut"))
    assert made.describe()["rows"]["val"] == {"split": "val", "count": 40}


def _saved(state: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({"dropout2": Bounded(0.1, 0.0, 0.9)}, "the hyperparameter 'dropout2' is not used; the names are brightness"),
        ({"dropout0": Bounded(0.1, 0.0, 1.5)}, "dropout0 may be 0 to 1.5, but has a meaning from 0 to 1 only"),
        ({"dropout0": Positive(0.1)}, "dropout0 may be 0 to inf"),
        ({"weight_decay": Bounded(0.1, -1.0, 1.0)}, "weight_decay may be -1 to 1"),
        ({"hue": Bounded(0.1, 0.0, 0.5)}, "hue is declared, but the images have 1 channels"),
        ({"cut_holes": Discrete(1, 0, 3)}, "cut_holes is there without cut_length"),
    ],
)
def test_hyperparameters_that_cannot_work(tuned: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        ImageProblem(SPLITS, tuned, Classifier(dense=(8, 8)).dropouts, 10, 10, 0)


def test_a_task_refuses_them_before_it_loads_anything() -> None:
    with pytest.raises(ValueError, match=r"'dropout5' is not used; the names are .*weight_decay_last"):
        StnImagesTask(tuned={"dropout5": Bounded(0.1, 0.0, 0.9)})


def test_rows_that_cannot_work() -> None:
    def problem(splits: Any) -> ImageProblem:
        return ImageProblem(splits, {"input_noise": Positive(0.1)}, (), 10, 10, 0)

    with pytest.raises(ValueError, match=r"dataset\.val=0"):
        problem(replace(SPLITS, val=SPLITS.val.take(slice(0, 0))))
    with pytest.raises(ValueError, match=r"not images of classes; change dataset"):
        problem(replace(SPLITS, shape=(64,)))
    with pytest.raises(ValueError, match=r"the pixels are not in \[0, 1\]; set dataset\.normalize=unit"):
        problem(_standardised())
    with pytest.raises(ValueError, match="shrink to nothing at convolution 1"):
        Classifier((4, 4, 4), (1, 8, 8), (1,)).build((1, 8, 8), 10, ())


def _standardised() -> Any:
    train = SPLITS.train
    return replace(SPLITS, train=replace(train, x=train.x - 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": (4,), "strides": ()}, "strides=.* for 1 convolutions; change strides"),
        ({"channels": (4,), "strides": (1,), "pooled": (1,)}, "pooled=.* names convolutions 0 to 0; change pooled"),
        ({"kernel_size": 4}, "kernel_size=4 is even; change kernel_size"),
        ({"dense": (0,)}, "dense=.* must list whole numbers >= 1"),
        ({"dense": "12"}, "dense='12' must list whole numbers"),
        ({"dense_dropout": "never"}, "dense_dropout='never' is not one of after, before"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(**values)
