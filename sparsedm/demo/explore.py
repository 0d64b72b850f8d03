"""The tab "Masks": what N:M keeps of a layer's weights."""

import functools

import gradio as gr
import torch

from .. import plots
from ..masking import layers, nm
from ..masking.plain import weight_layers
from ..measure import reporting
from . import checks, models, turns
from .models import Catalogue
from .words import about, said

GROUP_SIZES = (2, 4, 8, 16, 32)
HEAD = ("layer", "shape", "N:M", "share of MACs", "why dense")


def offered(catalogue: Catalogue) -> list[tuple[str, str]]:
    """Titles and keys of the models with all their weights."""
    return catalogue.choices("own", "teacher", "diffpruned")


@functools.lru_cache(maxsize=16)
def _weights(variant: models.Variant) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().cpu() for name, layer in weight_layers(models.copy_of(variant))}


def table(catalogue: Catalogue, key: str, pattern: str) -> list[list[str]]:
    """Every layer's shape and share of MACs, its pattern, or why it stays dense. Raises ValueError if no layer takes it."""
    model = layers.sparsify(models.copy_of(catalogue.load(key)), pattern)
    reasons = {name: getattr(layer, "dense_reason", "") for name, layer in model.named_modules()}
    return [
        [row.name, "x".join(map(str, row.shape)), row.pattern, f"{row.mac_share or 0:.1%}", reasons[row.name]]
        for row in reporting.report(model).rows
    ]


def words(weight: torch.Tensor, pattern: nm.NMPattern) -> str:
    """What the mask keeps of the weights' sum of squares, and what as many weights chosen freely would keep (Markdown)."""
    squares = weight.float().square()
    kept = squares[nm.mask(weight, pattern)].sum() / squares.sum()
    free = squares.flatten().topk(round(weight.numel() * pattern.density)).values.sum() / squares.sum()
    return (
        f"{pattern} keeps {pattern.density:.0%} of the weights and **{kept:.1%} of their sum of squares**; the largest "
        f"{pattern.density:.0%}, wherever they lie, would keep {free:.1%}. The difference is the price of the pattern."
    )


def explore(catalogue: Catalogue, model, layer, n, m) -> tuple:
    """One layer's weight under its N:M mask, how its largest weights fall into the groups, and the state of every layer."""
    try:
        checks.one_of("model", model, [key for _, key in offered(catalogue)])
        checks.within("M", m, 1, nm.MAX_M, whole=True)
        checks.within("N", n, 1, m, whole=True)
        with turns.turn():
            pattern, weights = nm.NMPattern(int(n), int(m)), _weights(catalogue.load(model))
            checks.one_of("layer", layer, weights)
            weight, rows = weights[layer], table(catalogue, model, pattern)
            return plots.groups(weight, pattern), plots.group_counts(weight, pattern), words(weight, pattern), rows
    except (ValueError, OSError) as error:
        raise said(error) from error


def build(catalogue: Catalogue, key: str, tab: gr.Tab) -> None:
    """The tab."""
    gr.HTML(
        "<p>N:M keeps the N largest of every M consecutive input weights. Choose a layer and a pattern: crosses mark what is "
        "pruned, and the bars show how unevenly the largest weights fall into the groups.</p>"
    )
    with gr.Row():
        model = gr.Dropdown(offered(catalogue), value=key, label="Model", min_width=180)
        layer = gr.Dropdown(**_layers(catalogue, key), label="Layer", min_width=220)
        m = gr.Radio(GROUP_SIZES, value=4, label="M, the size of a group", min_width=220)
        n = gr.Slider(1, 4, 2, step=1, label="N, how many stay", buttons=[], min_width=160)
    text = gr.Markdown()
    with gr.Row():
        groups = gr.Plot(show_label=False, label="Weights of the first groups", scale=3, min_width=320)
        counts = gr.Plot(show_label=False, label="Groups by how many of the largest weights they hold", scale=2, min_width=320)
    rows = gr.Dataframe(headers=list(HEAD), label="Every layer under this pattern", max_height=420, interactive=False)
    draw = {"fn": functools.partial(explore, catalogue), "inputs": [model, layer, n, m], "outputs": [groups, counts, text, rows]}
    shared = {"trigger_mode": "always_last", "concurrency_limit": 2, "show_progress": "hidden", "preprocess": False}

    def layers_of(key: str) -> gr.Dropdown:
        with turns.turn():
            return gr.Dropdown(**_layers(catalogue, key))

    model.input(layers_of, model, layer, api_visibility="private")
    m.input(lambda m, n: gr.Slider(maximum=m, value=min(n, m)), [m, n], n, api_visibility="private")
    gr.on([tab.select, layer.change, n.change, m.input], **draw, **shared, api_name="explore", api_description=about(explore))


def _layers(catalogue: Catalogue, key: str) -> dict:
    """A model's layers to choose from; the first one that 2:4 masks is chosen."""
    first = next(name for name, *_, why in table(catalogue, key, "2:4") if not why)
    return {"choices": list(_weights(catalogue.load(key))), "value": first}
