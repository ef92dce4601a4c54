"""The card of an export: what it is, what it was trained on, how good it is, and how it was made."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from hyperopt import __version__
from hyperopt.app.export.file import LONGEST
from hyperopt.core.text import one_line
from hyperopt.tasks.base import Task
from hyperopt.tasks.exports import LearnedModel

CERTIFICATE = ("hypergrad/error_estimate", "hypergrad/is_bound", "hypergrad/norm")
PAGE = """# {name}

What `hyperopt export` took from a run of the task {task}, `checkpoints/{checkpoint}.pt`, after {steps} outer steps.

```python
import hyperopt

model = hyperopt.load_exported("{file}")
{use}
```

Input: {shape} numbers a row{scaling}; output: {outputs}.

## Metrics

Measured at the export: `outer/*` on the fitted rows, `val/*` on those selected on, `test/*` on those held out.

{metrics}

## Certificate

{certificate}

## Dataset

{dataset}

## Hyperparameters

{hyperparameters}

## Versions

{versions}

## Config

{config}
"""


def card_of(
    task: Task,
    learned: LearnedModel,
    text: str,
    cfg: DictConfig,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    step: int,
    checkpoint: str,
) -> dict[str, Any]:
    """Return the card as plain data. The task is evaluated once more, at the state that is exported.

    ``text`` is that of ``config.yaml``, ``facts`` are those of ``run.json``, and ``rows`` are those of ``metrics.jsonl``.
    """
    described = task.describe()
    return {
        "name": str(cfg.name),
        "task": task.name,
        "checkpoint": checkpoint,
        "step": step,
        "precision": str(cfg.precision),
        "input": {"shape": list(learned.shape), "scaling": learned.scaling},
        "classes": learned.classes,
        "dataset": {
            "name": described.get("dataset"),
            "checksums": described.get("checksums") or {},
            "rows": described.get("rows") or {},
        },
        "hyperparameters": task.sizes(),
        "metrics": task.evaluate(),
        "certificate": certificate(rows, step),
        "git": facts.get("git"),
        "versions": {**(facts.get("versions") or {}), "hyperopt-bilevel": __version__},
        "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": text,
    }


def certificate(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """Return the latest certificate of the run up to a step, with its own step; empty if there was none."""
    for row in reversed(rows):
        if row.get("step", 0) <= step and row.get(CERTIFICATE[0]) is not None:
            return {"step": row["step"], **{name: row[name] for name in CERTIFICATE if name in row}}
    return {}


def page(card: Mapping[str, Any], file: str) -> str:
    """Return the card as the text of ``MODEL_CARD.md``."""
    scaling, shape, found = card["input"]["scaling"], card["input"]["shape"], card["certificate"]
    kind = "at most {:.3g}, a bound" if found.get("hypergrad/is_bound") else "about {:.3g}, an estimate"
    prepared = [
        f"x = model.prepare(raw)  # raw: (n, {', '.join(map(str, shape))}), as the dataset has them",
        "print(model.predict(x))",
    ]
    return PAGE.format(
        name=plain_or_code(card["name"]),
        task=code(card["task"]),
        checkpoint=card["checkpoint"],
        config=block("yaml", card["config"]),
        steps=card["step"] + 1,
        file=file,
        use="\n".join(prepared if scaling else ["print(model.predict(x))  # x: rows as the dataset makes them"]),
        shape=" x ".join(map(str, shape)),
        scaling=", flattened after `(raw / largest - mean) / std` (`model.prepare`)" if scaling else "",
        outputs=f"logits of {card['classes']} classes" if card["classes"] else "numbers",
        metrics=listed({name: f"{value:.6g}" for name, value in card["metrics"].items()}),
        certificate=f"Hypergradient at step {found['step']}: error {kind.format(found[CERTIFICATE[0]])}."
        if found
        else "The run made none.",
        dataset=listed(
            {"name": card["dataset"]["name"], **card["dataset"]["checksums"], "rows": json.dumps(card["dataset"]["rows"])}
        ),
        hyperparameters=listed(card["hyperparameters"]),
        versions=listed({**card["versions"], "git": json.dumps(card["git"]), "exported": card["exported"]}),
    )


def listed(facts: Mapping[str, Any]) -> str:
    """Return facts as a list with each value as code, so that no text of a config acts as markup."""
    return "\n".join(f"- {plain_or_code(name)}: {code(value)}" for name, value in facts.items()) or "none"


def plain_or_code(text: str) -> str:
    """Return a name as it is, or as code if it could act as markup."""
    return text if re.fullmatch(r"[\w./ -]+", text) else code(text)


def code(value: object) -> str:
    """Return a value as code in one line, between more backticks than it has in a row."""
    text = one_line(value, LONGEST)
    marks = "`" * (_backticks(text) + 1)
    return f"{marks} {text} {marks}" if "`" in text or not text else f"{marks}{text}{marks}"


def block(language: str, text: str) -> str:
    """Return lines as a block of code that no line can end."""
    marks = "`" * max(3, _backticks(text) + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def _backticks(text: str) -> int:
    """Return the length of the longest run of backticks in a text."""
    return max(map(len, re.findall("`+", text)), default=0)
