"""`python -m weightstream` is the command line, for where its script is not on the path."""

from weightstream.cli import main

if __name__ == "__main__":
    main()
