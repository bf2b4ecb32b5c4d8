"""Users who disagree: two groups with opposite tastes in style, served by one policy or by one policy each."""
