"""The papers' experiments as data, their results, and the verdicts on their claims."""
