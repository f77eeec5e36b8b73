"""A real engine on top of memory and scheduler. Nothing here yet."""
