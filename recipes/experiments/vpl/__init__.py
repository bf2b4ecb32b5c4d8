"""VPL: users who each care for one aspect of an answer, and policies that read their taste."""
