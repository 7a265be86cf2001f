"""`python -m raydist` is `raydist`."""

import os
import sys

if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - pathlib is not imported yet
    del sys.path[0]  # -m put the working folder first: a click.py there would run in place of click

from raydist.cli import main

main()
