"""Make diffusers importable when torch and torchvision come from different package indexes.

torchvision's compiled operators load only beside the torch build they were compiled for. With, say, a CPU build of torch
and the default torchvision wheel they do not load, and `import torchvision` (hence `import diffusers` with any UNet, and
torch-fidelity) stops at "operator torchvision::nms does not exist". Nothing here uses those operators, so declaring their
schemas is enough. On a matched pair the plain import works and nothing is declared: a second declaration would be an error.
"""

import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

from .imports import load_with

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries = []  # a torch.library.Library undoes its definitions when it is collected


def repair_torchvision_on_import() -> None:
    """From now on the first `import torchvision` declares its missing operators, if it fails for want of them.

    This imports neither torch nor torchvision. A torchvision that is imported already, is absent, or is broken in another way
    is left alone.
    """
    load_with("torchvision", _Loader)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        fresh = dict(vars(module))
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]  # half imported
            vars(module).clear()
            vars(module).update(fresh)
            _declare()
            super().exec_module(module)


def _declare() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _libraries.append(library)
