"""The shared compositions of the tests are those of Hydra."""

from __future__ import annotations

import pytest
from composing import CONFIGS, composed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

LINES = [
    ["task=l2", "task.l2.map=softplus", "seed=3"],
    ["solver.rtol=1e-3", "solver=anderson", "adjoint.linear_solver.max_steps=7"],
    ["task.hidden=[4,5]", "task=weight_decay", "inner=adam"],
    ["optimizer/scheduler=cosine", "optimizer.scheduler.T_max=9", "+optimizer.scheduler.last_epoch=-1"],
    ["experiment=equilibrium_mnist", "trainer.max_steps=null", "dataset.train=20"],
    ["task=stn_images", "+task/tuned@task.tuned.cut_length=discrete", "task.tuned.cut_length.high=3"],
    ["~trainer.eval_every", "trainer.monitor='val/loss'"],
]


@pytest.mark.cases(quick=2)
@pytest.mark.parametrize("overrides", LINES, ids=" ".join)
def test_a_config_is_the_one_that_hydra_composes(overrides: list[str]) -> None:
    found = composed(*overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert OmegaConf.to_container(found) == OmegaConf.to_container(compose("train", overrides=overrides))


def test_configs_are_not_shared() -> None:
    composed("seed=5").solver.rtol = 3
    assert composed("seed=6").solver.rtol != 3 and composed().seed not in (5, 6)


def test_what_hydra_refuses_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="rtoll"):
        composed("solver.rtoll=3")
