"""`python -m emloc` is `emloc`."""

from emloc.cli import main

main()
