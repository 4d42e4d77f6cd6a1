"""Programs that compare this package with its peers, both measured in one run."""
