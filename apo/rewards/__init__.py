"""Rewards fitted on comparisons, on frozen features: one for all, several tastes (PAL), a latent taste (VPL)."""
