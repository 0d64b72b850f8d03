"""Diff-Pruning: importance, channels that hang together, the record of those kept."""
