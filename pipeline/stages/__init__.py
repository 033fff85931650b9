"""What the command line calls, a module a stage with `run` and `summary`; each reads and writes directories.

They exchange nothing but those directories and import none of each other. Only `api` and `__main__` call them.
"""
