"""The command line: one file a command, which has its arguments and what it does side by side.

A command's help is the docstring of its file. It imports what it needs when it runs, so that `--help` is quick.
"""
