"""Environments beyond the built-in tasks: mathematics, programs in a sandbox, gymnasium, reasoning-gym, tools.

Nothing is imported here: the worker processes of this package start with as little as they can. Read next:
``math_problems.py`` for the simplest environment, ``sandbox.py`` for what keeps programs apart.
"""
