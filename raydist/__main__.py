"""`python -m raydist` is `raydist`."""

from raydist.cli import main

main()
