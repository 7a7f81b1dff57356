"""Supervised actors: state that one task touches, a bounded mailbox before it, and a supervisor that restarts it.

It knows nothing of training or workflows. Read next: ``crucible_kitchen.actors.actor``, then ``docs/actors.md``.
"""

from crucible_kitchen.actors.actor import Actor as Actor
from crucible_kitchen.actors.ref import ActorRef as ActorRef
from crucible_kitchen.actors.ref import Reply as Reply
from crucible_kitchen.actors.spec import ChildSpec as ChildSpec
from crucible_kitchen.actors.spec import Restarts as Restarts
from crucible_kitchen.actors.spec import SupervisorSpec as SupervisorSpec
from crucible_kitchen.actors.statistics import ActorStatistics as ActorStatistics
from crucible_kitchen.actors.statistics import Quarantined as Quarantined
from crucible_kitchen.actors.supervisor import Supervisor as Supervisor
from crucible_kitchen.actors.supervisor import supervise as supervise
from crucible_kitchen.waits import Waiting as Waiting

__all__ = [
    "Actor",
    "ActorRef",
    "ActorStatistics",
    "ChildSpec",
    "Quarantined",
    "Reply",
    "Restarts",
    "Supervisor",
    "SupervisorSpec",
    "Waiting",
    "supervise",
]
