"""The neighbours of docs/neighbours.md on their papers' kind of data; each experiment is one resumable command."""
