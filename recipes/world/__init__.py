"""A small closed world: tasks in words, a tiny model with systematic mistakes, and a server that revises its answers.

The tasks are in `tasks`, the skills they come from in `skills`, the model's script in `make_model`, the loopback
endpoint in `server`, and the run that ties them together in `quickstart`.
"""
