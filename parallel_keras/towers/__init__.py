"""The pure tower function, what makes it pure, and what towers return and share."""
