"""AST: the steps against their closed form, and in a training run that is resumed."""

import copy

import pytest
import torch
from torch import nn

import sparsedm
from sparsedm.masking import layers, nm
from sparsedm.training.ast import AST


def test_steps_are_the_closed_form():
    torch.manual_seed(0)
    model = layers.sparsify(nn.Sequential(nn.Linear(8, 6)).double(), decay=0.3, decay_mode="adam")
    layer, (b1, b2), lr, rise = model[0], (0.9, 0.95), 0.01, 3
    w, m, v = layer.weight.detach().clone(), 0, 0
    optimizer = AST([layer], lr, (b1, b2), weight_decay=0.1, rise=rise)
    for t in range(1, 6):
        x = torch.randn(4, 8, dtype=torch.float64)
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        gradient = layer.weight.grad.clone()
        optimizer.step()
        pruned = ~nm.mask(w, "2:4")
        w = w * (1 - lr * 0.1)
        m = b1 * m + (1 - b1) * gradient
        u = m + 0.3 * min(1, t / rise) * pruned * w
        v = b2 * v + (1 - b2) * u * u
        w = w - lr / (1 - b1**t) * u / ((v / (1 - b2**t)).sqrt() + 1e-8)
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rules", ({"decay": 0.5, "decay_mode": "adam"}, {"estimator": "s-ste"}), ids=("ast", "s-ste"))
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_stopped_run_ends_with_the_same_weights(tmp_path, make_model, rules, optimizer):
    teacher = make_model("uvit")
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = list(zip(images, [0, 1, 2, 3] * 2))
    options = {"steps": 4, "batch_size": 4, "lr": 1e-2, "optimizer": optimizer, "checkpoint_every": 1}

    def run(out, stop):
        student = sparsedm.sparsify(copy.deepcopy(teacher), **rules)
        for state in sparsedm.finetune(student, teacher, pictures, out=out, **options):
            if state.step == stop:
                return student
        return student

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert layers.patterns(layers.fold(whole))
