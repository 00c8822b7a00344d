"""Scripts that run in the environments of their own targets (see paredown.environments): started, never imported here."""
