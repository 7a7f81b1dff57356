"""The training server: sessions of a training client behind the JSON wire, as an ASGI application.

It knows the training port and the wire, not which executor stands behind the port. Extra ``[service]``. Read next:
``crucible_kitchen.service.server``.
"""
