"""Reinforcement learning: env groups as supervised actors, a bounded queue, staleness, ledgers, learners.

It knows ports, actors and the learner's mathematics, no adapter and no workflow; all of it runs in virtual time. Read
next: ``crucible_kitchen.rl.environments``.
"""
