"""Services: a YAML file in, a supervised HTTP endpoint out, on any host."""
