"""Kills a process at every instruction of the shared-memory primitives; see __main__.py."""
