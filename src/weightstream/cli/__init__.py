"""The command line: its commands import what they need when they run, so that --help and wrong arguments wait for nothing.

Results go to stdout, progress to stderr; what a person can put right ends with exit code 2.
"""

from weightstream.cli.root import app, main

__all__ = ["app", "main"]
