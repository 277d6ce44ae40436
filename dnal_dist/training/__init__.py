"""A run, from its recipe to the compact network: phases that alternate two kinds of steps."""
