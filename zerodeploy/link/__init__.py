"""Links: ways to reach a host."""
