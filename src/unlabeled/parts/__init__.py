"""What two or more methods share: heads, moving averages, memories, losses, clustering."""
