"""What a recipe is."""

from dataclasses import dataclass, field

from ...measure.protocol import Protocol


@dataclass(frozen=True)
class Recipe:
    """One experiment.

    Attributes:
        suite: "headline", "short", "one-shot", "rivals", "faces" or "paper".
        backbone: the kind of network, as tables name it.
        method: the sparsity or the baseline, as tables name it.
        base: the recipe whose model is the start of the training, and a student's teacher; "" for random weights.
        role: "teacher", "2x4", "diffpruned", ...; unique among the recipes of one suite with the same base.
        draws: the recipe whose model is scored once more, by another protocol; "" for a recipe that makes its own model.
        model: class and config of a model trained from scratch.
        schedule: noise schedule and prediction type of a model trained from scratch.
        context_tokens: tokens of text that the model takes, where its class's config does not tell; 0 for the class's own.
        pattern: N:M of a student; "" for dense.
        distil: whether the base is the teacher in a distillation.
        train: `TrainConfig` fields; {} for no training.
        data: the data set's name.
        bundle: whether the checkpoint ships with the package.
        sparsify: options of `sparsedm.sparsify`.
        calibrate: options of `sparsedm.calibrate`, from whose weights and masks training goes on; {} for masks by magnitude.
            With `data` None the inputs are the model's own trajectories.
        prune: options of `diffpruning.prune`, and the `threshold` of the importance; {} for whole models. With `reinit` the
            weights are drawn anew: the same shape from scratch.
        protocol: how to score.
        watch: training steps whose averaged weights are scored, too.
        seeds: how many runs, of seeds 0, 1, ..., a row in the tables stands for.
    """

    suite: str
    backbone: str
    method: str
    base: str = ""
    role: str = "teacher"
    draws: str = ""
    model: tuple[type, dict] | None = None
    schedule: dict = field(default_factory=dict)
    context_tokens: int = 0
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
