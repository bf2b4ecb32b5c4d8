"""Rewards fitted on comparisons of frozen features: one for all users, several tastes (PAL), a latent taste (VPL).

Imports `analysis` and `guarantees`.
"""
