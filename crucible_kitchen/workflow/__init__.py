"""The workflow engine: nodes and stages (values), check, describe and execute (functions over them).

It knows ports and events, no adapter, no store, no sink. Read next: ``crucible_kitchen.workflow.nodes``.
"""
