"""The training wire: messages and codecs of the JSON profile that training services speak.

Every long call is a POST below ``/api/v1`` that is answered at once with a request id; ``retrieve_future`` waits for
its result. Server and client both use what is here, and nothing else knows the bytes. It knows no HTTP and no torch.
What our own server can do beyond the profile travels in fields named ``crucible``, which others ignore, and is used
only where the server said so when the session was created. Read next: ``crucible_kitchen.wire.messages``.
"""
