"""Studies that train one configuration in several arms, cases and seeds, and state what the results support."""
