"""`python -m ttkit`."""

from ttkit.cli import main

main()
