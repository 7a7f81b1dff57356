"""The local torch executor: training and sampling in this process, behind the port ``training_client``.

Importing it loads no torch; opening a session does. Read next: ``client.py``, then ``session.py`` and ``trainer.py``.
"""

from crucible_kitchen_torch.client import TorchTrainingClient

__all__ = ["TorchTrainingClient"]
