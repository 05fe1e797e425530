"""Run the command line of `emloc` for `python -m emloc`."""

from emloc.cli import main

if __name__ == "__main__":
    main()
