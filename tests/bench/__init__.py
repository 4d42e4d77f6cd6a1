"""Programs that measure against a peer, in one run; no tests."""
