"""Small models of our own that are written as the authors of Visual Mambas write theirs: one class a repository.

They call the functions that those repositories import, under the stand-ins, in the same order of operations and on the
same layouts. Shapes: B images, C or D channels, E inner channels, H×W patches of L tokens, S states, R rank of dt.
"""
