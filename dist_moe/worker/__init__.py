"""One worker process: its rank, how it ends, its host, and what it agrees on with its launch."""
