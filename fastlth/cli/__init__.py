"""The command line: one small file per command. Each parses, calls one function, prints, and sets the exit code.

Nothing here imports torch at module level, so that ``fastlth --help`` answers at once.
"""
