"""The talk, page by page: what it said, what paredown measures, and why they differ. `scripts/book OUT` binds them."""
