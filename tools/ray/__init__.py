"""Ray Serve: replicas of `moetier serve` on the nodes of a cluster, with one daemon on each node.

``app`` builds the application, whose replicas are in ``replica``. Each asks the actor of its node, in ``daemon_actor``,
for a daemon, which ``supervisor`` runs. ``session_ids`` gives requests of one conversation the same session id, by
which Ray's router chooses a replica. The package imports ``cli`` and ``serve``. No other package imports Ray.
``moetier.ray`` has its public names.
"""
