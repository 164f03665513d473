"""`python -m hf_hadacore` is the `hadacore` command."""

from .cli import main

main()
