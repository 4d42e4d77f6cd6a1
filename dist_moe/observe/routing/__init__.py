"""The routing of single steps: distributions of scores and gate weights, and the trace in Parquet files."""
