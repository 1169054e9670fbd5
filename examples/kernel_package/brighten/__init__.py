"""A package with a kernel of its own."""
