"""Noise schedules and samplers."""

from .samplers import STEP_SEEDS, SampleState, generate, prepare, sample, start_noise, step_generators
from .schedules import (
    MOST_STEPS,
    SAMPLERS,
    add_noise,
    draw_timesteps,
    is_flow,
    make_scheduler,
    possible_samplers,
    predict_noise,
    predict_x0,
    target,
    training_scheduler,
)

__all__ = [
    "MOST_STEPS", "SAMPLERS", "STEP_SEEDS", "SampleState", "add_noise", "draw_timesteps", "generate", "is_flow", "make_scheduler",
    "possible_samplers", "predict_noise", "predict_x0", "prepare", "sample", "start_noise", "step_generators", "target",
    "training_scheduler",
]  # fmt: skip
