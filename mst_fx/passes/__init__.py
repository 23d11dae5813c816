"""The rewrites, one per file: find (read only), check (read only), rewrite."""
