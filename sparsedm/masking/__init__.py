"""N:M masks and the straight-through estimator."""
