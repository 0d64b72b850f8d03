"""sparsedm: N:M sparse (SparseDM) and structurally pruned (Diff-Pruning) diffusion models that really are smaller and faster.

teacher = sparsedm.load("glyphs-uvit")
student = sparsedm.sparsify(copy.deepcopy(teacher), "2:4")
for state in sparsedm.finetune(student, teacher, data="glyphs", steps=2000): ...
sparsedm.save(sparsedm.fold(student), "out")
"""

import importlib

from .support.compat import repair_torchvision_on_import
from .support.imports import follow

repair_torchvision_on_import()  # before anything imports diffusers
follow("diffusers.quantizers.auto", f"{__name__}.checkpoints.quantizer")  # `from_pretrained` reads packed folders

__version__ = "0.1.0"

_WHERE = {
    "NMConfig": "checkpoints.quantizer",
    "NMPattern": "masking.nm",
    "sparsify": "models.students",
    "densify": "masking.layers",
    "fold": "masking.layers",
    "pack": "packing.packed",
    "unpack": "packing.packed",
    "prune": "pruning.diffpruning",
    "importance": "pruning.diffpruning",
    "report": "measure.reporting",
    "count": "measure.macs",
    "train": "training.distill",
    "finetune": "training.distill",
    "calibrate": "training.calibrate",
    "sample": "diffusion.samplers",
    "generate": "diffusion.samplers",
    "load": "checkpoints.folders",
    "save": "checkpoints.folders",
    "save_packed": "checkpoints.folders",
    "build": "models.papers",
    "reproduce": "experiments.experiment",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    """Import on first use: `import sparsedm` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'sparsedm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
