"""The learner's mathematics: pure numpy functions with their sources; no config, no state, nothing of the engine.

Read next: ``crucible_kitchen.learner.schedules``.
"""
