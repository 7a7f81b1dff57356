"""The shipped stages: the coroutines that workflows are made of, one file per subject.

They know ports, never adapters, and no engine: each can be called directly. Read next:
``crucible_kitchen.workflows.supervised``, which composes them.
"""
