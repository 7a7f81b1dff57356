"""What tests of workflows and of adapters need: contract suites, fault injection, a virtual clock, recording sinks.

It may know everything else in the package; nothing else may know it. Read next: ``crucible_kitchen.testing.contracts``.
"""
