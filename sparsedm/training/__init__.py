"""Training and distillation, as generators."""
