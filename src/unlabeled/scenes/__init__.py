"""A procedural world: solids in a room, rendered with exact ground truth."""
