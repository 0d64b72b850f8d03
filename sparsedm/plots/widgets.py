"""Controls over a figure, for notebooks."""

import base64
import inspect
import io
from collections.abc import Callable
from typing import Any

import torch

from ..masking import nm
from .masks import groups


def explorer(draw: Callable[..., Any], **controls):
    """Controls over a figure: `draw` is called with their values whenever a control is moved.

    The message of a ValueError from `draw` stands below the last figure. Without ipywidgets, or on a page whose front end does
    not run widgets, there is the first figure alone.

    Args:
        draw: returns a matplotlib figure or a PIL picture, at first with the defaults of its arguments.
        **controls: by argument, as ipywidgets.interactive takes them: (low, high, step) for a slider, a list for a menu, a
            text for a field.
    """
    try:
        import ipywidgets
    except ImportError:
        return draw()

    class Explorer(ipywidgets.VBox):
        def _repr_mimebundle_(self, **kwargs) -> dict:
            return super()._repr_mimebundle_(**kwargs) | {"image/png": base64.b64encode(picture.value).decode()}

    defaults = inspect.signature(draw).parameters
    widgets = {name: ipywidgets.interactive.widget_from_abbrev(control) for name, control in controls.items()}
    layout = {"align_self": "flex-start", "max_width": "100%"}  # in its own size
    picture, refused = ipywidgets.Image(value=_png(draw()), format="png", layout=layout), ipywidgets.Label()

    def show(change: object) -> None:
        try:
            picture.value, refused.value = _png(draw(**{name: control.value for name, control in widgets.items()})), ""
        except ValueError as error:
            refused.value = str(error)

    for name, control in widgets.items():
        control.value, control.continuous_update = defaults[name].default, False
        control.description = name.replace("_", " ")
        control.observe(show, "value")
    return Explorer([*widgets.values(), picture, refused])


def group_explorer(weight: torch.Tensor, pattern: nm.NMPattern | str = "2:4"):
    """An `explorer` of `groups`, over N and M; N follows M, so that the ratio stays."""
    pattern = nm.NMPattern.parse(pattern)
    box = explorer(
        lambda M=pattern.m, N=pattern.n: groups(weight, nm.NMPattern(min(N, M), M)),
        M=[m for m in (2, 4, 8, 16, 32) if weight.shape[1] % m == 0],
        N=(1, pattern.m),
    )
    if children := getattr(box, "children", ()):
        larger, kept, *_ = children

        def keep_ratio(change: Any) -> None:
            with kept.hold_trait_notifications():
                kept.max, kept.value = change.new, max(1, round(kept.value * change.new / change.old))

        larger.observe(keep_ratio, "value")
    return box


def _png(drawn: Any) -> bytes:
    """The bytes of a PNG file of a matplotlib figure, cut as notebooks cut figures, or of a PIL picture."""
    buffer = io.BytesIO()
    save, options = (drawn.savefig, {"dpi": 80, "bbox_inches": "tight"}) if hasattr(drawn, "savefig") else (drawn.save, {})
    save(buffer, format="png", **options)
    return buffer.getvalue()
