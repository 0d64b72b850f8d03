"""What a model costs and what its pictures are worth."""
