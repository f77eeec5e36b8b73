"""`python -m pagedkv` is the `pagedkv` command."""

from pagedkv.simulations.cli import main

if __name__ == "__main__":
    main()
