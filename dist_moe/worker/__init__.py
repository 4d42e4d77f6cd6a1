"""One worker process: its rank, how it ends, and what it agrees on with its launch."""
