"""Users who disagree: two groups with opposite tastes in wording, and what one policy or one for each makes of it."""
