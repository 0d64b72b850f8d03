"""Seeds of what is drawn many times: each draw depends on the run's seed and on its own number alone."""


def numbered(seed: int, number: int) -> int:
    """The seed of draw `number` of a run with `seed`; two runs share none below a million draws."""
    return seed * 1_000_003 + number
