"""What a recipe is."""

from dataclasses import dataclass, field

from ...measure.protocol import Protocol


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        suite: "headline", "short" or "paper".
        backbone: the kind of network, as tables name it.
        method: what was done to it, as tables name it.
        base: the recipe whose model it starts from ("" for random weights): the teacher of a student.
        role: what it is among the recipes of its suite with the same base: "teacher", "2x4", "diffpruned", ...
        model: class and config of a model trained from scratch.
        schedule: its noise schedule and prediction type.
        pattern: N:M of a student; "" for dense.
        sparsify: options of `sparsedm.sparsify` for it.
        calibrate: options of `sparsedm.calibrate`, which then makes the masks; training keeps them ({}: masks by magnitude).
        prune: `diffpruning.prune`'s options, with the `threshold` of its importance; {} for whole models. With `reinit` the
            weights are drawn anew: the same shape from scratch.
        distil: transfer knowledge from the base while training.
        train: `TrainConfig` fields; empty for no training.
        bundle: whether its checkpoint ships with the package.
        watch: training steps at which the averaged weights are scored on the way.
        seeds: how many runs, of seeds 0, 1, ..., its row in the tables stands for.
    """

    suite: str
    backbone: str
    method: str
    base: str = ""
    role: str = "teacher"
    model: tuple[type, dict] | None = None
    schedule: dict = field(default_factory=dict)
    pattern: str = ""
    distil: bool = False
    train: dict = field(default_factory=dict)
    data: str = "glyphs"
    bundle: bool = False
    sparsify: dict = field(default_factory=dict)
    calibrate: dict = field(default_factory=dict)
    prune: dict = field(default_factory=dict)
    protocol: Protocol = Protocol()
    watch: tuple[int, ...] = ()
    seeds: int = 1

    @property
    def title(self) -> str:
        return f"{self.backbone} {self.method}"
