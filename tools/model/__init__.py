"""Models of the protocols in shared memory, and the checker that walks through all that they can do.

    python -m tools.model           every model, then every model with a fault put back in
    python -m tools.model blocks    those whose name begins so

docs/model.md is the page to read first.
"""
