"""What the command line says and offers: help, verbs, completion, and what to do next."""
