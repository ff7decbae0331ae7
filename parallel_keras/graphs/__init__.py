"""What a traced graph tells: what depends on what, and what follows the rows."""
