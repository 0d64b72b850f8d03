"""AST (arXiv 2407.20584): AdamW with the decay of pruned weights outside the momentum and inside the division."""

from collections.abc import Iterable

import torch

from ..masking.srste import NMLayer

EPS = 1e-8


class AST(torch.optim.Optimizer):
    """AdamW for the weights of sparse-training layers with decay_mode="adam".

        With the gradient g, m = b1 m + (1 - b1) g, u = m + lambda_t (1 - mask) w, v = b2 v + (1 - b2) u^2, and
    w <- (1 - lr weight_decay) w - lr / (1 - b1^t) u / (sqrt(v / (1 - b2^t)) + eps). The momentum never holds the decay, and a
    weight whose gradients are large decays little. lambda_t rises linearly to the layer's `decay` over `rise` steps. v averages
    the squares of u, not of g, as in the authors' code: the first steps are up to 1 / (1 - b1) times AdamW's, so warm up.

    Args:
            layers: whose weights are trained.
            rise: steps, a quarter of all in the paper.
    """

    def __init__(self, layers: Iterable[NMLayer], lr: float, betas: tuple[float, float], weight_decay: float, rise: int):
        self.layers, self.rise = list(layers), max(1, rise)
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__([layer.weight for layer in self.layers], settings)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step with the gradients that are there."""
        (group,) = self.param_groups
        for layer, weight in zip(self.layers, group["params"]):
            if weight.grad is not None:
                self._update(layer, weight, group)

    def _update(self, layer: NMLayer, weight: torch.nn.Parameter, group: dict) -> None:
        state, (b1, b2) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        t, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        decay = layer.decay * min(1.0, t / self.rise)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        m.lerp_(weight.grad, 1 - b1)
        u = torch.add(m, weight - layer.sparse_weight(), alpha=decay)
        v.mul_(b2).addcmul_(u, u, value=1 - b2)
        weight.addcdiv_(u, (v / (1 - b2**t)).sqrt_().add_(EPS), value=-group["lr"] / (1 - b1**t))
