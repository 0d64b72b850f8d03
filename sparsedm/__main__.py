"""`python -m sparsedm COMMAND --help`."""

from .cli import main

main()
