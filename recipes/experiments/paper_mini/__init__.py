"""The paper's claims on tiny worlds whose regime is set: designs, runs, verdicts and their page."""
