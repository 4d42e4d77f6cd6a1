"""Studies: what the design claims, measured again on small or artificial cases."""
