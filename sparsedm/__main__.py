"""`python -m sparsedm COMMAND --help`."""

from .cli import main

if __name__ == "__main__":
    main()
