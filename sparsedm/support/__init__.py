"""Files, processes, timing: what knows nothing of diffusion."""
