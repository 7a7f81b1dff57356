"""Training and sampling on a training server, over the JSON wire.

Read next: ``client.py``.
"""

from crucible_kitchen_http.client import HttpSamplingClient, HttpTrainingClient

__all__ = ["HttpSamplingClient", "HttpTrainingClient"]
