"""Users who disagree: two groups with opposite tastes in style, and one policy for all or one for each group."""
