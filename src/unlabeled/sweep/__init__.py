"""Many runs from one command: members, their table, and where they run."""
