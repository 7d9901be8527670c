"""The CPU half: from files to uint8 crops."""
