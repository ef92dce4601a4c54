"""Whether a sentence has a verb, by a list of the forms that pages and docstrings use. A new text may need another form here."""

from __future__ import annotations

import re

# Forms that are a verb wherever they stand in these texts: auxiliaries, the third person, the plural or imperative, the past.
VERBS = set(
    """am are be can cannot could did do does had has have is may might must need needs shall should was were will would
    accepts acts adds agrees allows approximates balances beats becomes begins belongs brings builds cancels catches
    chooses classifies combines comes compares compiles composes computes consists contains continues contracts
    converges decides defines depends derives dies differentiates differs diverges divides ends equals evaluates
    examines exceeds expects failed fails falls fetches finds fits follows frees gains gets gives goes grows happens
    helps holds installs keeps kills knows lacks learns leaves lets linearises loses lowers makes matters meets modifies
    negates offers overfits overshoots overwrites owns parses passes pays predicts prints proposes puts reaches reads
    receives recommends reduces refuses remembers reproduces responds resumes reuses returns rises saves says sees
    selects sends settles shares shows solves sorts spans stands stays stops submits supports takes teaches tells tends
    trains translates tunes uses varies waits wins works writes add agree allow apply ask become begin belong behave
    choose coincide come compare compose compute contain continue converge convert cover decide declare depend determine
    differ fail fall find follow gain get give go happen hold keep learn let lie lose make match meet minimise overfit
    pass pay predict put reach recover refuse replace respond return say see show solve stay stop support take tell tend
    train tune use wait win work write became began came chose diverged fell gave grew knew led ran saw took went wrote""".split()
)
# Forms that are also a noun or a participle count, like those in -ed, before an object and at the start of a sentence.
EITHER = set(
    """biases bounds calls changes checks copies costs counts cuts doubles draws estimates exports form forms imports limits
    lists looks maps means measures moves names notes orders overrides pins pulls replays reports results runs searches
    starts states steps sweeps tests tracks turns updates call change check copy count cut draw end estimate export help
    install leave list load look measure mind move name note open print read report run save search set start state step
    sweep test trace try turn update""".split()
)
OBJECTS = set(
    """a all an another both code each eagerly every four half how it its more most neither no nothing one only onto shapes
    that the their them these this those torch two what when where which whether you your""".split()
)


def has_verb(sentence: str) -> bool:
    """Whether a form of the lists stands in the sentence, other than in "to run" or in a relative clause such as "that runs"."""
    words = re.findall(r"[a-z0-9]+(?:['.-][a-z0-9]+)*", sentence.lower().replace("n't", ""))
    for i, (before, word, after) in enumerate(zip(["", *words], words, [*words[1:], ""], strict=False)):
        if before == "to" or (before in ("that", "which", "who") and i > 1):
            continue
        if (
            word in VERBS
            or ((word in EITHER or word.endswith("ed")) and after in OBJECTS)
            or (word in EITHER and (before == "code" or (i == 0 and word[-1] != "s")))
        ):
            return True
    return False


def fragments(sentences: list[str]) -> list[str]:
    """Those of more than five words that end like a sentence and have no verb; ``**Noise of the weights.**`` is a heading."""
    ended = [each for each in sentences if len(each.split()) > 5 and re.search(r"[.!?][\")*_]*$", each)]
    return [each for each in ended if not has_verb(each) and not re.match(r"\*\*[^*]+(\*\*)?$", each)]
