"""Many runs: how far they are, and what is left of those that were killed."""
