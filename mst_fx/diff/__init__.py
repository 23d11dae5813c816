"""The graph diff: what was changed and why, and what lives when, as text and as a page."""
