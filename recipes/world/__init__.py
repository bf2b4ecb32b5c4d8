"""A small closed world of tasks in words, a tiny model that makes systematic mistakes in it, and a server that revises.

The tasks are in `tasks`, the skills they come from in `skills`, the model's script in `make_model`, the loopback
endpoint in `server`, and the run that ties them together in `quickstart`.
"""
