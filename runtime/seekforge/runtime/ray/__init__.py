"""Replicas of an engine under Ray Serve: each is an actor with the server's endpoints in front of an engine.

Ray starts replicas, routes requests to them, and starts anew what has ended: `replica` is what one does, `application`
how Ray is told of it.
"""
