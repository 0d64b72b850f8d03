"""Make diffusers importable when torch and torchvision come from different package indexes.

torchvision's compiled operators load only beside the torch build they were compiled for. With, say, a CPU build of torch
and the default torchvision wheel they do not load, and `import torchvision` (hence `import diffusers` with any UNet, and
torch-fidelity) stops at "operator torchvision::nms does not exist". Nothing here uses those operators, so declaring their
schemas is enough. On a matched pair the plain import works and nothing is declared: a second declaration would be an error.
"""

import importlib
import importlib.util
import sys

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_libraries = []  # a torch.library.Library undoes its definitions when it is collected


def repair_torchvision() -> bool:
    """Import torchvision, declaring its missing operators if the plain import fails for want of them.

    Returns True when the declaration was needed. A torchvision that is absent, or broken in another way, is left alone.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
    _libraries.append(library)
    importlib.import_module("torchvision")
    return True
