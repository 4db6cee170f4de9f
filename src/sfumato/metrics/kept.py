"""What a student has kept of its teacher: both draw for the same prompts, the teacher as it recommends, the student in
few calls of its network.

On scenes it is a share: how many of the student's pictures show just what was said, over how many of the teacher's.
Elsewhere nothing reads a picture back, so pictures are compared with the teacher's by their energy score, and the
teacher itself is judged alike, at its own settings and in as many calls as the student. Calls are counted where they
are made: they are rows that go through the network for each picture, so a guided step is two.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.conditioners import Raw
from sfumato.data.picture import Image
from sfumato.metrics.energy import energy_scores, numbers
from sfumato.metrics.intervals import ratio, told_mean
from sfumato.metrics.scenes import evaluate
from sfumato.pipeline import Pipeline, Progress

FEW = (1, 2, 4)  # steps of a student, beside those that it recommends
SEED = 0  # of the prompts and the noise: as of `sfumato eval`, whose numbers these are

Showing = Callable[[str], AbstractContextManager[Progress]]  # what shows how far a drawing is, by its name


@dataclass(frozen=True)
class Way:
    """A way to draw, and what came of it.

    calls: of the network, for a picture. score, with its 95% interval low to high: of scenes a share of pictures, else
    an energy score. kept: of a student on scenes, its share of the teacher's; None where that is too small to tell.
    equal: the teacher's score in as many calls, where pictures are compared.
    """

    steps: int
    calls: float
    score: float
    low: float
    high: float
    kept: float | None = None
    kept_low: float | None = None
    kept_high: float | None = None
    equal: float | None = None


@dataclass(frozen=True)
class Kept:
    """suite: "scenes" or "energy". n: pictures of each way. student: what it recommends first, then few steps.

    of: what the student is compared with, in words.
    """

    suite: str
    n: int
    teacher: Way
    student: list[Way]
    of: str = "its teacher"

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        ways = [{name: one for name, one in asdict(way).items() if one is not None} for way in self.student]
        teacher = {name: one for name, one in asdict(self.teacher).items() if one is not None}
        return {"suite": self.suite, "of": self.of, "n": self.n, "teacher": teacher, "student": ways}

    def lines(self) -> list[str]:
        """A sentence for each way of the student."""
        return [self._share(way) if self.suite == "scenes" else self._distance(way) for way in self.student]

    def _share(self, way: Way) -> str:
        both = f"{way.score:.2f} of {self.teacher.score:.2f}"
        if way.kept is None or way.kept_low is None or way.kept_high is None:
            return f"in {_calls(way.calls)} {both} of {self.of}: too few pictures to say what is kept"
        within = f"95%: {100 * way.kept_low:.0f} to {100 * way.kept_high:.0f}%"
        return f"keeps {100 * way.kept:.0f}% of {self.of} in {_calls(way.calls)} ({both}, {within})"

    def _distance(self, way: Way) -> str:
        within = f"95%: {way.low:.3f} to {way.high:.3f}"
        equal = "" if way.equal is None else f", {way.equal:.3f} in as many calls"
        own = f"itself {self.teacher.score:.3f} in {_calls(self.teacher.calls)}{equal}"
        return f"{way.score:.3f} from the pictures of {self.of} in {_calls(way.calls)} ({within}; {own})"


def _calls(calls: float) -> str:
    return f"{calls:g} call{'' if calls == 1 else 's'}"


@contextmanager
def unshown(name: str) -> Iterator[Progress]:
    """Shows nothing."""
    yield lambda done, total: None


@contextmanager
def counted(pipeline: Pipeline) -> Iterator[list[int]]:
    """The rows of every call of the network while it lasts."""
    rows: list[int] = []
    hook = pipeline.model.net.register_forward_pre_hook(lambda net, given: rows.append(len(given[0])))
    try:
        yield rows
    finally:
        hook.remove()


def judged_steps(student: Pipeline, few: Sequence[int] = FEW) -> list[int]:
    """The steps at which a student is judged: those that it recommends, then the few."""
    return list(dict.fromkeys([int(student.settings().steps), *few]))


def kept_of_scenes(
    teacher: Pipeline,
    student: Pipeline,
    per_task: int,
    *,
    few: Sequence[int] = FEW,
    seed: int = SEED,
    batch: int = 100,
    showing: Showing = unshown,
    of: str = "its teacher",
) -> Kept:
    """By the scenes suite, on `per_task` prompts of each task. Raises as `sfumato.metrics.scenes.evaluate` does."""

    def way(pipeline: Pipeline, who: str, steps: int | None) -> tuple[Way, int]:
        with showing(who if steps is None else f"{who}, {steps}") as progress, counted(pipeline) as rows:
            options: dict[str, Any] = {
                "per_task": per_task,
                "held_out": 0,
                "seed": seed,
                "batch": batch,
                "progress": progress,
            }
            found = evaluate(pipeline, steps=steps, **options).as_dict()
        n = int(found["images"])
        calls, taken = round(sum(rows) / n, 2), int(found["settings"]["steps"])
        return Way(taken, calls, found["overall"], found["low"], found["high"]), n

    whole, n = way(teacher, of, None)
    ways = []
    for steps in judged_steps(student, few):
        one, _ = way(student, "the student", steps)
        share = ratio((one.score, one.low, one.high), (whole.score, whole.low, whole.high))
        kept = {} if share is None else dict(zip(("kept", "kept_low", "kept_high"), share, strict=True))
        ways.append(Way(one.steps, one.calls, one.score, one.low, one.high, **kept))
    return Kept("scenes", n, whole, ways, of)


def kept_of_pictures(
    teacher: Pipeline,
    student: Pipeline,
    raw: Sequence[Raw],
    *,
    few: Sequence[int] = FEW,
    seed: int = SEED,
    batch: int = 32,
    showing: Showing = unshown,
    of: str = "its teacher",
) -> Kept:
    """By the energy score against the teacher's pictures for some raw conditions, two draws of each: lower is nearer.

    raw: as data sources give them; of them each model is told what it reads. Raises DataError for words that a model
    does not know, ConfigError for a student of another size than its teacher can draw.
    """
    size, n = student.model.size, len(raw)

    def draw(pipeline: Pipeline, first: int, name: str, **settings: Any) -> Image:
        with showing(name) as progress:
            said = pipeline.model.known(raw)
            seeds = [seed * 1_000_003 + first * n + i for i in range(n)]
            return pipeline.sample(said, seeds=seeds, size=size, batch=batch, progress=progress, **settings).images

    truth = numbers(draw(teacher, 2, of))

    def way(pipeline: Pipeline, who: str, **settings: Any) -> Way:
        steps = int(pipeline.settings(**settings).steps)
        name = f"{who}, {steps}"
        with counted(pipeline) as rows:
            drawn = [numbers(draw(pipeline, k, name, **settings)) for k in range(2)]
        told = told_mean(energy_scores(drawn, truth).tolist())
        mean = told["mean"]
        return Way(steps, round(sum(rows) / (2 * n), 2), mean, told.get("low", mean), told.get("high", mean))

    whole = way(teacher, of)
    equal: dict[float, float] = {}
    ways = []
    for steps in judged_steps(student, few):
        one = way(student, "the student", steps=steps)
        if one.calls not in equal:
            equal[one.calls] = way(teacher, of, **_equal(whole, one.calls)).score
        ways.append(Way(one.steps, one.calls, one.score, one.low, one.high, equal=equal[one.calls]))
    return Kept("energy", n, whole, ways, of)


def _equal(teacher: Way, calls: float) -> dict[str, Any]:
    """Settings by which a teacher makes as many calls, at most: where a guided step is too many, unguided ones."""
    steps = int(calls / (teacher.calls / teacher.steps))
    return {"steps": steps} if steps else {"steps": max(1, round(calls)), "guidance": 1.0}
